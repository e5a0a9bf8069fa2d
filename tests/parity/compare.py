"""What each rank of a cell does: the same training at the cell's layout, compared by name with the reference."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.batch import Batch
from lockstep_trainer.loss import Loss
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.expert import update_balance
from lockstep_trainer.parallel.gradients import clip, copies, squares
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, reset_buffers
from lockstep_trainer.parallel.pipeline import parts_of
from lockstep_trainer.parallel.sharded import local_shard, own_shard
from lockstep_trainer.parallel.stages import modelled_costs
from parity.cases import LENGTH, SAMPLES, STEPS, Case
from parity.problem import LARGEST_NORM, SPEC, Z_WEIGHT, global_batch, weight
from parity.reference import Reference

CPU = torch.device("cpu")


def run_rank(case: Case, reference: Path, result: Path) -> None:
    """Train and compare; the first rank writes errors by kind to ``result``."""
    torch.set_default_dtype(torch.float64 if case.precision == "fp64" else torch.float32)
    expected: Reference = torch.load(reference, weights_only=False)
    config, layout = case.config, case.layout
    layout.check(config, sequence_length=LENGTH, micro_batches=case.micro_batches)
    meshes = Meshes.build(layout, CPU)
    parts = build_parts(
        config,
        layout,
        meshes,
        device=CPU,
        precision="bf16" if case.precision == "bf16" else "fp32",
        recompute=case.recompute,
        compile_backend=case.backend,
        stages=parts_of(layout, meshes.at.pipeline, modelled_costs(config, LENGTH)),
    )
    engine = Engine(
        parts,
        layout,
        meshes,
        Loss(Z_WEIGHT, meshes.tensor.get_group()),
        micro_batch_size=SAMPLES // layout.data_width // case.micro_batches,
        device=CPU,
        dtype=torch.bfloat16 if case.precision == "bf16" else torch.get_default_dtype(),
    )
    with torch.no_grad():
        for name, parameter in engine.named_parameters():
            local_shard(parameter).copy_(own_shard(weight(name, parameter.shape), parameter))
    for part in parts:
        reset_buffers(part)
    parameters = list(engine.named_parameters())
    optimizer = build_optimizer(parameters, SPEC.model_copy(update={"name": case.optimizer}))
    errors = {"loss": 0.0, "norm": 0.0}
    for step in range(STEPS):
        batch = global_batch(step, config, documents=case.documents)
        sums = engine.forward_backward(_own(batch, case, meshes.rank), batch.tokens)
        totals = torch.cat([sums, squares(parameters, layout, engine.second_copies)[None].to(sums.dtype)])
        dist.all_reduce(totals)
        loss, norm = float(totals[:2].sum() / batch.tokens), math.sqrt(float(totals[2]))
        errors["loss"] = max(errors["loss"], abs(loss / expected.losses[step] - 1))
        errors["norm"] = max(errors["norm"], abs(norm / expected.norms[step] - 1))
        if step == 0:
            gradients = {name: p.grad for name, p in parameters if p.grad is not None}
            _compare("gradient", gradients, expected.gradients, engine, errors, floor=expected.norms[0])
        clip(parameters, norm, LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if config.experts:
            update_balance(parts, meshes)
    _compare("parameter", dict(parameters), expected.parameters, engine, errors)
    buffers = {name: value for name, value in engine.state().items() if name not in dict(parameters)}
    _compare_buffers(buffers, expected.buffers, errors)
    if meshes.rank == 0:
        result.write_text(json.dumps(errors))


def _own(batch: Batch, case: Case, rank: int) -> Batch:
    """The samples of this rank."""
    size = SAMPLES // case.layout.data_width
    own = slice(size * case.layout.data_rank(rank), size * (1 + case.layout.data_rank(rank)))
    positions = None if batch.positions is None else batch.positions[own]
    documents = None if batch.documents is None else batch.documents[own]
    return Batch(batch.inputs[own], batch.targets[own], positions, documents)


def _compare(
    kind: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    engine: Engine,
    errors: dict[str, float],
    *,
    floor: float = 0.0,
) -> None:
    """The largest of the relative errors ‖found − expected‖ / ‖expected‖ over all names.

    What should be 0 has no relative error: a norm below a millionth of ``floor`` counts as that. Fails where an element
    of an expected tensor is on no rank, or a name is not expected.
    """
    names = sorted(expected)
    unknown = set(found) - set(names)
    assert not unknown, f"{kind} that the reference has not: {unknown}"
    rows = torch.zeros(len(names), 3, dtype=torch.float64)  # squared error, squared norm, elements held
    stage_ranks = engine.layout.world_size // engine.layout.pipeline
    for row, name in zip(rows, names, strict=True):
        if name in found:
            own = local_shard(found[name]).detach().double()
            wanted = own_shard(expected[name], found[name])
            assert own.shape == wanted.shape, f"{name}: {own.shape} and not {wanted.shape}"
            held = 0.0 if name in engine.second_copies else own.numel() / copies(name, found[name], stage_ranks)
            row.copy_(torch.tensor([(own - wanted).square().sum(), wanted.square().sum(), held]))
    dist.all_reduce(rows)
    for row, name in zip(rows.tolist(), names, strict=True):
        assert round(row[2]) == expected[name].numel(), (
            f"{name}: {row[2]} of {expected[name].numel()} elements are held"
        )
        norm = max(math.sqrt(row[1]), floor * 1e-6)
        error = math.sqrt(row[0]) / norm if norm else math.sqrt(row[0])
        if not error <= errors.get(kind, 0.0):  # also where it is not a number
            errors[kind] = error
            errors[f"{kind} of"] = name  # type: ignore[assignment]


def _compare_buffers(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], errors: dict[str, float]) -> None:
    """Buffers are the same on all ranks that have them."""
    worst = max((float((found[name] - expected[name]).abs().max()) for name in found), default=0.0)
    total = torch.tensor([worst, len(found) / dist.get_world_size()], dtype=torch.float64)
    dist.all_reduce(total)
    errors["buffer"] = float(total[0])
