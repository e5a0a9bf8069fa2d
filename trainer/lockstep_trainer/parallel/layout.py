"""Degrees of parallelism and which rank is where: plain arithmetic, without torch.

Ranks are numbered with the tensor axis innermost, so that its groups stay within a node, then context, shard, replicate
and pipeline outermost. Experts fold over shard × context × tensor: ``expert`` of these ranks, neighbours first, share
the experts of a layer, and the rest of them shard each expert's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep_api.v1alpha1 import ParallelismSpec
from lockstep_api.v1alpha1.parallelism import V_SCHEDULES, runs_with
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.config import DecoderConfig

ContextMethod = Literal["allGather", "ulysses"]
SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_SCHEDULES)
"""Schedules that compute the gradients of inputs and of weights apart."""


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a rank is on each axis."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The degrees of a job."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    schedule: str = "1F1B"
    stages_per_rank: int = 1
    context_method: ContextMethod = "allGather"

    @classmethod
    def of(cls, spec: ParallelismSpec, world_size: int) -> Layout:
        """The layout of ``world_size`` ranks; raises UserError where the degrees do not make it."""
        named = spec.replicate * spec.context * spec.tensor * spec.pipeline
        if world_size % named or (spec.shard is not None and spec.shard * named != world_size):
            raise UserError(
                f"parallelism: replicate {spec.replicate} × shard {spec.shard or 'left out'} × context {spec.context} "
                f"× tensor {spec.tensor} × pipeline {spec.pipeline} does not make {world_size} ranks"
            )
        return cls(
            replicate=spec.replicate,
            shard=world_size // named,
            context=spec.context,
            tensor=spec.tensor,
            pipeline=spec.pipeline,
            expert=spec.expert,
            schedule=spec.schedule,
            stages_per_rank=spec.stages_on_a_rank,
            context_method="ulysses" if spec.context_method == "ulysses" else "allGather",
        )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def data_width(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    @property
    def stages(self) -> int:
        """Pieces of the model along the pipeline."""
        return self.pipeline * self.stages_per_rank

    @property
    def expert_shard(self) -> int:
        """Ranks that share the weights of one expert."""
        return self.shard * self.context * self.tensor // self.expert

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` is."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        rest, shard = divmod(rest, self.shard)
        pipeline, replicate = divmod(rest, self.replicate)
        return Coordinates(pipeline, replicate, shard, context, tensor)

    def data_rank(self, rank: int) -> int:
        """Which of the ``data_width`` parts of a batch ``rank`` works on."""
        at = self.coordinates(rank)
        return at.replicate * self.shard + at.shard

    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages on a pipeline rank, in the model's order. Of n ranks, the r-th has r, r + n, r + 2n, …; in a
        V-shaped schedule r and 2n − 1 − r, so that the first has both ends of the model."""
        if self.pipeline > 1 and self.schedule in V_SCHEDULES:
            return (pipeline_rank, 2 * self.pipeline - 1 - pipeline_rank)
        return tuple(range(pipeline_rank, self.stages, self.pipeline))

    def runs_with(self, micro_batches: int) -> bool:
        """Whether the schedule can do a step of so many micro-batches."""
        return runs_with(self.schedule, self.pipeline, self.stages, micro_batches)

    def fitting(self, micro_batches: int) -> int:
        """The smallest number of micro-batches, from this one on, that the schedule can do."""
        while not self.runs_with(micro_batches):
            micro_batches += 1
        return micro_batches

    def check_micro_batches(self, number: int) -> None:
        """Raises UserError where the schedule can't do a step of so many micro-batches."""
        if not self.runs_with(number):
            raise UserError(
                f"parallelism: schedule {self.schedule} with {self.stages} stages can't do {number} micro-batches per "
                f"step, the next number it can do is {self.fitting(number)}; change globalBatchTokens or microBatchSize"
            )

    def check(self, config: DecoderConfig, *, sequence_length: int, micro_batches: int) -> None:
        """Raises UserError with a sentence where the model, the samples or the batch do not fit these degrees."""
        problems = [
            (config.heads % self.tensor, f"tensor {self.tensor} does not divide the model's {config.heads} heads"),
            (
                config.kv_heads % self.tensor,
                f"tensor {self.tensor} does not divide the model's {config.kv_heads} key-value heads",
            ),
            (config.ffn_dim % self.tensor, f"tensor {self.tensor} does not divide ffn_dim {config.ffn_dim}"),
            (
                config.vocab_size % self.tensor,
                f"tensor {self.tensor} does not divide the vocabulary of {config.vocab_size}",
            ),
            (
                self.context_method == "ulysses" and config.kv_heads % (self.tensor * self.context),
                f"contextMethod ulysses needs key-value heads ({config.kv_heads}) that tensor × context = "
                f"{self.tensor * self.context} divides; use allGather",
            ),
            (
                self.expert > 1 and not config.experts,
                f"expert is {self.expert} and the model has no experts; leave it out",
            ),
            (
                config.experts % self.expert,
                f"expert {self.expert} does not divide the model's {config.experts} experts",
            ),
            (
                sequence_length % (self.tensor * self.context * (2 if self.context > 1 else 1)),
                f"sequenceLength {sequence_length} is not a multiple of tensor × context (× 2 with context)",
            ),
            (
                config.positions == "learned" and sequence_length > config.max_length,
                f"sequenceLength {sequence_length} is more than the {config.max_length} positions that the model "
                "learns; raise trainer.model.overrides.max_length",
            ),
            (
                config.layers < self.stages,
                f"{self.stages} stages for {config.layers} layers; lower pipeline or stagesPerRank",
            ),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise UserError(f"parallelism: {sentence}")
        self.check_micro_batches(micro_batches)
