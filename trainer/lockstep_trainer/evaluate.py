"""Loss on held-out documents, in all and of each source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lockstep_trainer.batch import IGNORE, Batch
from lockstep_trainer.parallel.engine import Engine


@dataclass(frozen=True, slots=True)
class Score:
    """Loss over some tokens."""

    loss: float  # nats per token
    tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """What one evaluation found."""

    whole: Score
    sources: dict[str, Score]


def evaluate(engine: Engine, sources: Mapping[str, Callable[[], Iterator[Batch]]]) -> Result:
    """Mean loss over the batches of each source; all ranks call it, with as many batches, and get the same result."""
    totals = torch.zeros(len(sources), 2, dtype=torch.float64, device=engine.device)
    for number, batches in enumerate(sources.values()):
        for batch in batches():
            own = batch.to(engine.device)
            totals[number] += torch.stack([engine.evaluate(own)[0], own_tokens(engine, own).double()])
    dist.all_reduce(totals)
    sums = dict(zip(sources, totals.tolist(), strict=True))
    scores = {name: Score(loss / tokens, int(tokens)) for name, (loss, tokens) in sums.items()}
    tokens = sum(score.tokens for score in scores.values())
    return Result(Score(sum(loss for loss, _ in sums.values()) / tokens, tokens), scores)


def own_tokens(engine: Engine, batch: Batch) -> Tensor:
    """Tokens with a target in the batch, counted on one of the ranks that have it: summed over the world, those of the
    global batch. An int64 scalar."""
    at = engine.meshes.at
    return batch.tokens if (at.pipeline, at.context, at.tensor) == (0, 0, 0) else torch.zeros_like(batch.tokens)


def reference_loss(
    model: Callable[..., float], training: NDArray[np.integer], batches: Iterator[Batch], vocabulary: int
) -> float:
    """The loss of a counting ``model`` (``bigram.bigram_loss``) on exactly the tokens with a target in ``batches``."""
    pairs: list[Tensor] = []
    for batch in batches:
        counted = batch.targets != IGNORE
        pairs.append(torch.stack([batch.inputs[counted], batch.targets[counted]]))
    previous, following = torch.cat(pairs, dim=1).numpy()
    return model(training, previous, following, vocabulary)
