"""On how many nodes a job can train: whole data-parallel replicas, the same global batch.

Pure arithmetic, for the operator, which chooses a number of nodes, and for the workers, which must come to the same
degrees of parallelism by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep_api.v1alpha1.parallelism import ParallelismSpec, runs_with

if TYPE_CHECKING:
    from lockstep_api.v1alpha1.job import TrainingJobSpec
    from lockstep_api.v1alpha1.trainer import TrainerSpec


def resized(layout: ParallelismSpec, full: int, gpus: int) -> ParallelismSpec:
    """The degrees on ``gpus`` of the ``full`` GPUs that ``layout`` was made for. Tensor, pipeline, context and expert
    stay complete. With copies of the sharded model (``replicate`` above 1) whole copies go and a copy's shards stay;
    without, ranks of ``shard`` go and each of those left holds a larger part.

    Raises ValueError with a clause that says why there is no such layout.
    """
    if gpus == full:
        return layout
    model = layout.tensor * layout.pipeline * layout.context
    if gpus % model:
        raise ValueError(f"{gpus} GPUs are no multiple of tensor × pipeline × context = {model}")
    width = gpus // model
    if layout.replicate == 1:
        fresh = layout if layout.shard is None else layout.model_copy(update={"shard": width})
    else:
        shard = full // (model * layout.replicate)
        if width % shard:
            raise ValueError(
                f"{gpus} GPUs are no multiple of the {shard * model} that one of the {layout.replicate} copies of the "
                "model takes (shard × tensor × pipeline × context)"
            )
        fresh = layout.model_copy(update={"replicate": width // shard})
    inner = gpus // (fresh.replicate * fresh.pipeline)
    if inner % fresh.expert:
        raise ValueError(f"expert {fresh.expert} does not divide shard × context × tensor = {inner}")
    return fresh


def obstacle(spec: TrainingJobSpec, nodes: int) -> str | None:
    """Why the job can't train on so many nodes, as a clause; None where it can."""
    gpus = nodes * spec.gpus_per_node
    try:
        layout = resized(spec.parallelism, spec.nodes * spec.gpus_per_node, gpus)
    except ValueError as error:
        return str(error)
    if spec.trainer is None:
        return None
    return _batch_obstacle(spec.trainer, layout, gpus // (layout.tensor * layout.pipeline * layout.context))


def largest(spec: TrainingJobSpec, at_most: int) -> int | None:
    """The largest number of nodes, up to ``at_most`` and not below ``resilience.elastic.minNodes``, that the job can
    train on; None where there is none."""
    elastic = spec.resilience.elastic
    smallest = elastic.min_nodes if elastic else spec.nodes
    fitting = (nodes for nodes in range(min(at_most, spec.nodes), smallest - 1, -1) if obstacle(spec, nodes) is None)
    return next(fitting, None)


def _batch_obstacle(trainer: TrainerSpec, layout: ParallelismSpec, width: int) -> str | None:
    """Why the global batch does not divide among ``width`` data-parallel ranks."""
    recipe, length = trainer.recipe, trainer.data.sequence_length
    ramp, whole = recipe.batch_ramp, recipe.global_batch_tokens
    sizes = [whole]
    if ramp is not None:
        growth = whole - ramp.start_tokens
        sizes = [ramp.start_tokens + growth * part // ramp.increments for part in range(ramp.increments + 1)]
    for tokens in sizes:
        if tokens % (length * width):
            return (
                f"a batch of {tokens} tokens is no multiple of sequenceLength × data-parallel width = {length * width}"
            )
        share = tokens // (length * width)
        if recipe.micro_batch_size and share % recipe.micro_batch_size:
            return (
                f"microBatchSize {recipe.micro_batch_size} does not divide the {share} samples of a data-parallel rank"
            )
        # Without microBatchSize a pipeline's micro-batches are of one sample.
        parts = share // (recipe.micro_batch_size or 1)
        if layout.pipeline > 1 and not runs_with(layout.schedule, layout.pipeline, layout.stages, parts):
            return f"schedule {layout.schedule} can't do {parts} micro-batches per step"
    return None
