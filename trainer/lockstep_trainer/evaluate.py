"""Loss on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from numpy.typing import NDArray
from torch import Tensor, nn

from lockstep_trainer.data.prepare import Corpus, sample_batch, samples_in


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of one evaluation."""

    loss: float  # nats per token
    tokens: int


def evaluation_samples(corpus: Corpus, sequence_length: int, at_most: int) -> NDArray[np.int64]:
    """The held-out samples that are read, the same each time: spread evenly over the held-out text."""
    samples = samples_in(corpus.meta.holdout, sequence_length)
    if samples <= at_most:
        return np.arange(samples)
    return np.arange(at_most) * samples // at_most


def evaluate(
    model: nn.Module,
    corpus: Corpus,
    samples: NDArray[np.int64],
    *,
    sequence_length: int,
    per_rank: int,
    device: torch.device,
) -> Evaluation:
    """Mean loss over ``samples``; all ranks call it and get the same result.

    Each forward pass takes ``per_rank`` samples on each rank. Forward passes are collective, so a rank that has run out
    of samples goes along with one that counts nothing.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for start in range(0, len(samples), per_rank * ranks):
            own = samples[start : start + per_rank * ranks][rank::ranks]
            ids = own if len(own) else samples[:1]
            batch = torch.from_numpy(sample_batch(corpus.holdout, ids, sequence_length)).to(device)
            loss = token_loss(model(batch[:, :-1]), batch[:, 1:])
            if len(own):
                totals += torch.stack([loss.double(), torch.tensor(batch[:, 1:].numel(), device=device).double()])
    dist.all_reduce(totals)
    loss_sum, tokens = totals.tolist()
    return Evaluation(loss_sum / tokens, int(tokens))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies, in nats: logits (B, T, V), targets (B, T). Computed in float32 at least."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def reference_loss(
    corpus: Corpus,
    samples: NDArray[np.int64],
    *,
    sequence_length: int,
    vocabulary: int,
    model: Callable[..., float],
) -> float:
    """The loss of a counting ``model`` (``bigram.bigram_loss``) on exactly the tokens that ``evaluate`` reads."""
    batch = sample_batch(corpus.holdout, samples, sequence_length)
    return model(corpus.train, batch[:, :-1], batch[:, 1:], vocabulary)
