"""A bigram model to compare with: what counting pairs of tokens achieves on the same text.

P(b | a) = λ₂ · count(a b) / count(a) + λ₁ · count(b) / N + λ₀ / V, with weights λ per frequency class of ``a``
(deleted interpolation; Jelinek and Mercer 1980). The weights are tuned by expectation-maximisation **on the tokens
that it is then measured on**: no honest bigram model of this form can do better there, so the comparison flatters it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ITERATIONS = 40  # of EM; the likelihood changes in the fifth digit by then
MAX_TOKENS = 50_000_000
"""Training tokens that are counted at most: a bigram model has long converged by then, and memory is bounded."""


def bigram_loss(
    training: NDArray[np.integer], previous: NDArray[np.integer], following: NDArray[np.integer], vocabulary: int
) -> float:
    """Mean loss in nats per token of the tuned model, trained on the stream ``training``, over the pairs
    (previous[i], following[i])."""
    training = np.asarray(training[:MAX_TOKENS], np.int64)
    previous, following = np.asarray(previous, np.int64).ravel(), np.asarray(following, np.int64).ravel()
    single = np.bincount(training, minlength=vocabulary)
    as_context = np.bincount(training[:-1], minlength=vocabulary)
    codes, pairs = np.unique(training[:-1] * vocabulary + training[1:], return_counts=True)

    wanted = previous * vocabulary + following
    place = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    pair_count = np.where(codes[place] == wanted, pairs[place], 0)
    context = as_context[previous]
    candidates = np.stack(
        [
            pair_count / np.maximum(context, 1),
            single[following] / len(training),
            np.full(len(wanted), 1.0 / vocabulary),
        ]
    )  # 3 × pairs
    classes = np.where(context > 0, np.log2(np.maximum(context, 1)).astype(np.int64) + 1, 0)
    loss = 0.0
    for each in np.unique(classes):
        loss -= _tuned_log_likelihood(candidates[:, classes == each])
    return float(loss / len(wanted))


def _tuned_log_likelihood(candidates: NDArray[np.float64]) -> float:
    """Σ log Σ λ·p with the λ that EM finds; ``candidates`` has shape (models, tokens)."""
    weights = np.full(len(candidates), 1.0 / len(candidates))
    for _ in range(_ITERATIONS):
        share = weights[:, None] * candidates
        share /= share.sum(axis=0)
        weights = share.mean(axis=1)
    return float(np.log(weights @ candidates).sum())
