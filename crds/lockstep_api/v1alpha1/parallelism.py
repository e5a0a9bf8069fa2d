"""How the GPUs are used, and what does not go together."""

from __future__ import annotations

from pydantic import Field

from lockstep_api.v1alpha1.base import Model

SCHEDULES_OF_ONE_STAGE = ("GPipe", "1F1B")
V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")


class ParallelismSpec(Model):
    """How the GPUs are used: replicate × shard × context × tensor × pipeline of them. What the other degrees leave is
    sharded data parallelism (FSDP)."""

    replicate: int = Field(default=1, ge=1, le=1_048_576)
    """Copies of the sharded model (hybrid sharding)."""
    shard: int | None = Field(default=None, ge=1, le=1_048_576)
    """Ranks that share one copy of the weights (FSDP). Without it: what the other degrees leave."""
    tensor: int = Field(default=1, ge=1, le=64)
    """Ranks that share each matrix product, and the sequence between them (tensor and sequence parallel)."""
    pipeline: int = Field(default=1, ge=1, le=1024)
    """Ranks that share the layers."""
    context: int = Field(default=1, ge=1, le=1024)
    """Ranks that share a sequence in attention too (context parallel)."""
    expert: int = Field(default=1, ge=1, le=1_048_576)
    """Ranks that share the experts of a layer; taken from shard × context × tensor, not from the GPUs."""
    schedule: str = Field(
        default="1F1B",
        pattern="^(GPipe|1F1B|Interleaved1F1B|LoopedBFS|InterleavedZeroBubble|ZBVZeroBubble|DualPipeV)$",
    )
    """Order of the pipeline's work: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble or
    DualPipeV."""
    stages_per_rank: int | None = Field(default=None, ge=1, le=64)
    """Pieces of the model on each pipeline rank, with an interleaved schedule; 2 without it."""
    split: str = Field(default="modelled", pattern="^(modelled|measured|count)$")
    """How layers are given to stages: by computed cost, by cost measured at start, or by count."""
    context_method: str = Field(default="allGather", pattern="^(allGather|ulysses)$")
    """How attention crosses ranks: keys and values are gathered (allGather), or heads are exchanged (ulysses)."""

    @property
    def stages_on_a_rank(self) -> int:
        """Pieces of the model on each pipeline rank."""
        if self.pipeline == 1 or self.schedule in SCHEDULES_OF_ONE_STAGE:
            return 1
        return 2 if self.schedule in V_SCHEDULES else self.stages_per_rank or 2

    @property
    def stages(self) -> int:
        """Pieces of the model along the pipeline."""
        return self.pipeline * self.stages_on_a_rank


def runs_with(schedule: str, pipeline: int, stages: int, micro_batches: int) -> bool:
    """Whether the schedule can do a step of so many micro-batches. What torch's schedules need: GPipe, LoopedBFS and
    ZBVZeroBubble nothing, 1F1B and DualPipeV one for each stage, and those in rounds full rounds."""
    if pipeline > 1 and schedule in ("1F1B", "DualPipeV"):
        return micro_batches >= stages
    if pipeline > 1 and schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return micro_batches >= 1 and micro_batches % max(1, micro_batches // pipeline) == 0
    return micro_batches >= 1


_GPUS = "self.nodes * self.gpusPerNode"
_NAMED = "self.parallelism.replicate * self.parallelism.tensor * self.parallelism.pipeline * self.parallelism.context"
_MODEL_WIDTH = "self.parallelism.tensor * self.parallelism.pipeline * self.parallelism.context"  # GPUs of one sample


def layout_rules() -> tuple[tuple[str, str], ...]:
    """Rules on the degrees of parallelism and the batch. ``Layout`` in the trainer has those that need the model."""
    unit = f"self.trainer.data.sequenceLength * ({_GPUS} / ({_MODEL_WIDTH}))"
    return (
        (
            f"({_GPUS}) % ({_NAMED}) == 0",
            f"'parallelism: replicate × tensor × pipeline × context = %d does not divide the %d GPUs of this job "
            f"(nodes × gpusPerNode); choose degrees whose product does'.format([{_NAMED}, {_GPUS}])",
        ),
        (
            # By division: the product of all degrees may be too large for an integer.
            f"!has(self.parallelism.shard) || ({_GPUS}) % ({_NAMED}) != 0 || "
            f"self.parallelism.shard == {_GPUS} / ({_NAMED})",
            f"'parallelism.shard: with the other degrees it makes %d GPUs, and this job has %d; leave it out to take "
            f"what is left'.format([self.parallelism.shard * {_NAMED}, {_GPUS}])",
        ),
        (
            f"({_GPUS}) / (self.parallelism.replicate * self.parallelism.pipeline) % self.parallelism.expert == 0",
            f"'parallelism.expert: %d does not divide shard × context × tensor = %d; choose a divisor'"
            f".format([self.parallelism.expert, {_GPUS} / (self.parallelism.replicate * self.parallelism.pipeline)])",
        ),
        (
            "self.gpusPerNode % self.parallelism.tensor == 0 || self.parallelism.tensor % self.gpusPerNode == 0",
            "'parallelism.tensor: %d neither divides gpusPerNode %d nor is a multiple of it: its groups would "
            "straddle nodes'.format([self.parallelism.tensor, self.gpusPerNode])",
        ),
        (
            "!has(self.trainer) || self.trainer.data.sequenceLength % "
            "(self.parallelism.tensor * self.parallelism.context * (self.parallelism.context > 1 ? 2 : 1)) == 0",
            "'trainer.data.sequenceLength: %d is not a multiple of tensor × context (× 2 with context) = %d; choose "
            "one'.format([self.trainer.data.sequenceLength, self.parallelism.tensor * self.parallelism.context * "
            "(self.parallelism.context > 1 ? 2 : 1)])",
        ),
        (
            f"!has(self.trainer) || ({_GPUS}) % ({_NAMED}) != 0 || "
            f"self.trainer.recipe.globalBatchTokens % ({unit}) == 0",
            f"'trainer.recipe.globalBatchTokens: %d is not a multiple of sequenceLength × data-parallel width = %d; "
            f"choose a multiple'.format([self.trainer.recipe.globalBatchTokens, {unit}])",
        ),
        (
            f"!has(self.trainer) || !has(self.trainer.recipe.batchRamp) || ({_GPUS}) % ({_NAMED}) != 0 || "
            f"(self.trainer.recipe.batchRamp.startTokens % ({unit}) == 0 && "
            "(self.trainer.recipe.globalBatchTokens - self.trainer.recipe.batchRamp.startTokens) % "
            f"(self.trainer.recipe.batchRamp.increments * ({unit})) == 0)",
            "'trainer.recipe.batchRamp: startTokens and each of the parts up to globalBatchTokens must be multiples of "
            f"sequenceLength × data-parallel width = %d; change startTokens or increments'.format([{unit}])",
        ),
    )


_ELASTIC = "self.resilience.elastic"
_FEWER = f"({_ELASTIC}.minNodes * self.gpusPerNode)"  # GPUs of the fewest nodes


def elastic_rules() -> tuple[tuple[str, str], ...]:
    """Rules on ``resilience.elastic.minNodes``: the job can train on as few. ``widths.obstacle`` has those that need
    the ramp and the schedule too."""
    named = f"{_ELASTIC}.minNodes"
    replica = f"({_GPUS}) / self.parallelism.replicate"  # GPUs of one copy of the sharded model
    unit = f"self.trainer.data.sequenceLength * ({_FEWER} / ({_MODEL_WIDTH}))"
    return (
        (
            f"!has({_ELASTIC}) || {named} <= self.nodes",
            f"'resilience.elastic.minNodes: %d is more than nodes, %d; choose fewer, or leave elastic out'"
            f".format([{named}, self.nodes])",
        ),
        (
            f"!has({_ELASTIC}) || ({_GPUS}) % ({_NAMED}) != 0 || {named} > self.nodes || "
            f"{_FEWER} % (self.parallelism.replicate > 1 ? {replica} : {_MODEL_WIDTH}) == 0",
            f"'resilience.elastic.minNodes: %d nodes have no whole number of data-parallel replicas of %d GPUs; choose "
            f"a number that has'.format([{named}, self.parallelism.replicate > 1 ? {replica} : {_MODEL_WIDTH}])",
        ),
        (
            f"!has({_ELASTIC}) || ({_GPUS}) % ({_NAMED}) != 0 || self.parallelism.replicate > 1 || "
            f"{_FEWER} / self.parallelism.pipeline % self.parallelism.expert == 0",
            f"'resilience.elastic.minNodes: on %d nodes parallelism.expert %d does not divide shard × context × "
            f"tensor; choose more'.format([{named}, self.parallelism.expert])",
        ),
        (
            f"!has({_ELASTIC}) || !has(self.trainer) || ({_GPUS}) % ({_NAMED}) != 0 || "
            f"{_FEWER} % ({_MODEL_WIDTH}) != 0 || self.trainer.recipe.globalBatchTokens % ({unit}) == 0",
            f"'resilience.elastic.minNodes: on %d nodes trainer.recipe.globalBatchTokens %d is not a multiple of "
            f"sequenceLength × data-parallel width = %d; choose another number'.format([{named}, "
            f"self.trainer.recipe.globalBatchTokens, {unit}])",
        ),
    )
