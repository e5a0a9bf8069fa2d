"""Which samples a step consumes, and which of them one data-parallel rank takes.

Any restart, at any data-parallel width, goes on with exactly the samples that come next: the step's number names the
global indices, and ``order.Mixture`` the sample at each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lockstep_api.v1alpha1 import DataSpec
from lockstep_trainer.checkpoint.manifest import BatchState, SamplerState, SourceState, StageState
from lockstep_trainer.data.order import Draws, Mixture, Stage
from lockstep_trainer.errors import UserError


class BatchSizes(Protocol):
    """Samples per step, over all ranks; the first step is 1."""

    def samples(self, step: int) -> int:
        """Samples of step ``step``."""
        ...

    def samples_before(self, step: int) -> int:
        """Samples of all steps before ``step``."""
        ...


@dataclass(frozen=True, slots=True)
class ConstantBatch:
    """Every step has the same number of samples."""

    per_step: int

    def samples(self, step: int) -> int:
        """Samples of any step."""
        del step
        return self.per_step

    def samples_before(self, step: int) -> int:
        """Samples of all steps before ``step``."""
        return (step - 1) * self.per_step


@dataclass(frozen=True, slots=True)
class Sampler:
    """The sequence of samples of one job, as one data-parallel rank sees it."""

    mixture: Mixture
    batches: BatchSizes
    rank: int  # of the data-parallel ranks
    ranks: int

    def step(self, number: int) -> Draws:
        """This rank's samples in step ``number`` (the first is 1): the rank-th of equal parts of the step's indices."""
        samples = self.batches.samples(number)
        share, rest = divmod(samples, self.ranks)
        if rest:
            raise UserError(
                f"trainer.recipe: step {number} has {samples} samples, which is not a multiple of the data-parallel "
                f"width {self.ranks}; change globalBatchTokens or batchRamp"
            )
        first = self.batches.samples_before(number) + self.rank * share
        return self.mixture.at(np.arange(first, first + share))


def stages_of(spec: DataSpec, sizes: Mapping[str, int], batches: BatchSizes) -> tuple[Stage, ...]:
    """The mix over the run: none where every sample has the same weight throughout.

    ``sizes`` has the training samples of each source, in the order of ``spec.sources``. Raises UserError where a stage
    names a source that is not there, or leaves nothing to train on.
    """
    weighted = any(source.weight is not None for source in spec.sources)
    if not weighted and not spec.stages:
        return ()
    given = {source.name: source.weight for source in spec.sources}
    base = tuple(float(given.get(name) or 0) if weighted else float(size) for name, size in sizes.items())
    stages = [Stage(0, base)]
    for number, stage in enumerate(spec.stages):
        unknown = sorted(set(stage.weights) - set(sizes))
        if unknown:
            raise UserError(
                f"trainer.data.stages[{number}].weights: there is no source {unknown[0]}; the sources are "
                f"{', '.join(sizes)}"
            )
        weights = tuple(float(stage.weights.get(name, 0)) for name in sizes)
        if not any(weights):
            raise UserError(f"trainer.data.stages[{number}].weights: all are 0; give one source a weight")
        first = batches.samples_before(stage.from_step)
        if first <= stages[-1].first:  # a stage that begins with the first step replaces the weights of the sources
            stages.pop()
        stages.append(Stage(first, weights))
    return tuple(stages)


def sampler_state(
    mixture: Mixture,
    batches: BatchSizes,
    *,
    steps: int,
    last_change: int,
    sources: Sequence[SourceState],
    data: str,
) -> SamplerState:
    """What a checkpoint behind step ``steps`` says of the order: all that is needed to derive it again.

    ``last_change`` is a step from which on all steps have the same number of samples (1 without a ramp).
    """
    pieces: list[BatchState] = []
    for step in range(1, last_change + 1):
        samples = batches.samples(step)
        if not pieces or pieces[-1].samples != samples:
            pieces.append(BatchState(step=step, first=batches.samples_before(step), samples=samples))
    return SamplerState(
        seed=mixture.seed,
        steps=steps,
        drawn=batches.samples_before(steps + 1),
        sources=tuple(sources),
        stages=tuple(StageState(first=stage.first, weights=stage.weights) for stage in mixture.stages),
        batches=tuple(pieces),
        data=data,
    )
