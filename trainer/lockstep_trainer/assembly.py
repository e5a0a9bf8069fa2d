"""From a job's specification to the engine that trains its model on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from lockstep_api.v1alpha1 import RecipeSpec, S3Spec, TrainerSpec
from lockstep_trainer.config import Job
from lockstep_trainer.errors import UserError
from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.files import TOKENIZER
from lockstep_trainer.model.huggingface import family
from lockstep_trainer.model.presets import model_config
from lockstep_trainer.model.pretrained import load_weights, read_config
from lockstep_trainer.model.weights import parameter_count
from lockstep_trainer.optim.ramp import BatchRamp
from lockstep_trainer.own import OwnLoss, build_own_model, own_loss
from lockstep_trainer.parallel.engine import Engine, Section
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.measured import measured_costs
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize
from lockstep_trainer.parallel.pipeline import parts_of
from lockstep_trainer.parallel.recompute import Recompute
from lockstep_trainer.parallel.stages import Costs, costs_by_count, modelled_costs
from lockstep_trainer.precision import check_precision
from lockstep_trainer.ranks import Ranks
from lockstep_trainer.storage import ObjectStore, open_store

MICRO_BATCH_TOKENS = 8192
"""Tokens that one forward pass of a rank takes where the recipe does not say: bounds the memory for logits, and fills a
GPU."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """A model spread over the ranks, with memory and no values yet."""

    engine: Engine
    layout: Layout
    meshes: Meshes
    config: DecoderConfig | None  # None: a model of the user's own
    weights: int  # of the whole model, a tied one once
    measured: Costs | None = None  # what the pipeline was split by, where that was measured


def assemble(
    job: Job,
    ranks: Ranks,
    batches: BatchRamp,
    *,
    tokens: int,
    timeout: timedelta,
    section: Section,
    measured: Sequence[float] | None = None,
) -> Assembly:
    """The job's model on these ranks; all of them call it. ``tokens`` is the number of tokens of the tokenizer,
    ``measured`` what rank 0 knows of the costs by which the pipeline was split before (``Costs.numbers``).

    Raises UserError where the model, the layout and the batch do not go together.
    """
    recipe = job.trainer.recipe
    check_precision(recipe.precision, ranks.device)
    length = job.trainer.data.sequence_length
    layout = Layout.of(job.spec.parallelism, ranks.size)
    if job.trainer.model.module is not None:
        meshes = Meshes.build(layout, ranks.device, timeout=timeout)
        return _own(job, ranks, batches, layout, meshes, tokens=tokens, section=section)
    checkpoint = read_config(_pretrained(job)) if job.trainer.model.init_from else None
    config = model_config(job.trainer.model, tokens, checkpoint=checkpoint)
    if job.trainer.export:  # refused now, not behind the last step
        check_export_folder(job.trainer, job.checkpoint.s3)
        family(config)
    size = micro_batch_size(recipe, layout, length, batches)
    for samples in _sizes(batches):
        layout.check(config, sequence_length=length, micro_batches=samples // layout.data_width // size)
    meshes = Meshes.build(layout, ranks.device, timeout=timeout)
    costs = _costs(job, layout, config, device=ranks.device, micro_batch_size=size, before=measured)
    parts = build_parts(
        config,
        layout,
        meshes,
        device=ranks.device,
        precision=recipe.precision,
        recompute=_recompute(recipe),
        compile_backend=_compiler(recipe),
        stages=parts_of(layout, meshes.at.pipeline, costs),
    )
    engine = Engine(
        parts,
        layout,
        meshes,
        _loss(recipe, layout, meshes),
        micro_batch_size=size,
        device=ranks.device,
        dtype=torch.float32 if recipe.precision == "fp32" else torch.bfloat16,
        section=section,
    )
    return Assembly(engine, layout, meshes, config, parameter_count(config), costs if _measures(job, layout) else None)


def _own(
    job: Job, ranks: Ranks, batches: BatchRamp, layout: Layout, meshes: Meshes, *, tokens: int, section: Section
) -> Assembly:
    """The same with a model of the user's own, which has its first values already."""
    recipe, data = job.trainer.recipe, job.trainer.data
    if job.trainer.export:  # refused now, not behind the last step
        raise UserError(
            "trainer.export: a model of your own (model.module) has no form that `transformers` knows; leave export out"
        )
    model = build_own_model(
        job.trainer.model, recipe, tokens, layout, meshes, documents=data.document_mask, control=ranks.control
    )
    engine = Engine(
        [model],
        layout,
        meshes,
        _loss(recipe, layout, meshes),
        micro_batch_size=micro_batch_size(recipe, layout, data.sequence_length, batches),
        device=ranks.device,
        documents=data.document_mask,
        section=section,
    )
    return Assembly(engine, layout, meshes, None, sum(parameter.numel() for parameter in model.parameters()))


def _compiler(recipe: RecipeSpec) -> str | None:
    """torch.compile's backend for what is compiled; None: nothing is."""
    return "inductor" if recipe.compile else None


def _loss(recipe: RecipeSpec, layout: Layout, meshes: Meshes) -> Loss | OwnLoss:
    group = meshes.tensor.get_group() if layout.tensor > 1 else None
    return own_loss(recipe, group) if recipe.loss is not None else Loss(recipe.z_loss, group, _compiler(recipe))


def fill(engine: Engine, job: Job, control: dist.ProcessGroup | None) -> None:
    """First values: those of ``model.initFrom``, or fresh ones by the seed. A model of the user's own has them. All
    ranks of ``control`` (gloo) call it."""
    if job.trainer.model.module is not None:
        return
    parts = [part for part in engine.parts if isinstance(part, Decoder)]
    initialize(parts, job.trainer.recipe.seed)
    if job.trainer.model.init_from:
        load_weights(engine.state(), parts[0].config, _pretrained(job), group=control)


def batch_sizes(job: Job, world_size: int) -> BatchRamp:
    """Samples of each step; raises UserError where they do not divide among the data-parallel ranks."""
    width = Layout.of(job.spec.parallelism, world_size).data_width
    return BatchRamp.of(job.trainer.recipe, sequence_length=job.trainer.data.sequence_length, data_width=width)


def _sizes(batches: BatchRamp) -> list[int]:
    """Samples of a step, at each level of the ramp."""
    return [batches.first + level * batches.increase for level in range(batches.increments + 1)]


def micro_batch_size(recipe: RecipeSpec, layout: Layout, length: int, batches: BatchRamp) -> int:
    """Samples of one forward pass of a rank: what the recipe says, else what divides every step's share of a rank,
    holds at most MICRO_BATCH_TOKENS, and is 1 with a pipeline.

    Raises UserError where the recipe's does not divide.
    """
    shares = [samples // layout.data_width for samples in _sizes(batches)]
    asked = recipe.micro_batch_size
    if asked is not None:
        odd = [share for share in shares if share % asked]
        if odd:
            raise UserError(
                f"trainer.recipe.microBatchSize: {asked} does not divide the {odd[0]} samples that a data-parallel "
                "rank has in a step; change it or globalBatchTokens"
            )
        return asked
    most = 1 if layout.pipeline > 1 else max(1, MICRO_BATCH_TOKENS // length)
    return max(size for size in range(1, most + 1) if all(share % size == 0 for share in shares))


def check_export_folder(spec: TrainerSpec, s3: S3Spec | None = None) -> None:
    """Raises UserError where the export has no store to go to, or would remove what the job reads whenever it starts
    again. Nothing is contacted."""
    assert spec.export is not None
    try:
        open_store(spec.export.uri, s3)
    except UserError as error:
        raise UserError(f"trainer.export.uri: {error}") from None
    sources = {"trainer.model.initFrom": spec.model.init_from, "trainer.tokenizer.uri": spec.tokenizer.uri}
    for field, uri in sources.items():
        if uri and uri.removesuffix(f"/{TOKENIZER}").rstrip("/") == spec.export.uri.rstrip("/"):
            raise UserError(f"trainer.export.uri: the export would replace {field}; name another folder")


def _pretrained(job: Job) -> ObjectStore:
    uri = job.trainer.model.init_from
    assert uri is not None
    return open_store(uri, job.checkpoint.s3)


def _recompute(recipe: RecipeSpec) -> Recompute:
    return cast(Recompute, recipe.activation_checkpointing)  # the resource lets nothing else through


def _measures(job: Job, layout: Layout) -> bool:
    return job.spec.parallelism.split == "measured" and layout.pipeline > 1


def _costs(
    job: Job,
    layout: Layout,
    config: DecoderConfig,
    *,
    device: torch.device,
    micro_batch_size: int,
    before: Sequence[float] | None,
) -> Costs:
    """What the pipeline's split goes by."""
    recipe, length = job.trainer.recipe, job.trainer.data.sequence_length
    recompute = _recompute(recipe)
    if _measures(job, layout):
        return measured_costs(
            config,
            layout,
            device=device,
            precision=recipe.precision,
            recompute=recompute,
            micro_batch_size=micro_batch_size,
            sequence_length=length,
            before=before,
        )
    if job.spec.parallelism.split == "count":
        return costs_by_count(config)
    return modelled_costs(config, length, recompute=recompute)
