"""A small decoder on several ranks beside the same one in a single process, in float64: the difference is rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor
from torch.distributed.tensor import DTensor

from lockstep_trainer.batch import IGNORE, Batch
from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.init import initial_weight
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize
from lockstep_trainer.parallel.pipeline import parts_of
from lockstep_trainer.parallel.stages import modelled_costs

CPU = torch.device("cpu")
SEED = 5
Z_LOSS = 1e-3


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared."""

    layout: Layout
    config: DecoderConfig
    micro_batches: int = 4
    micro_batch_size: int = 1
    length: int = 16
    documents: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of build_parts


def global_batch(case: Case) -> Batch:
    """All samples of a step; some targets are ignored, a different number in each sample."""
    samples = case.layout.data_width * case.micro_batches * case.micro_batch_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, case.config.vocab_size, (samples, case.length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for sample in range(samples):
        targets[sample, : sample % 5] = IGNORE
    if not case.documents:
        return Batch(tokens[:, :-1], targets)
    begins = torch.rand(samples, case.length, generator=generator) < 0.3
    begins[:, 0] = False
    documents = begins.cumsum(1)
    index = torch.arange(case.length).expand(samples, -1)
    starts = torch.where(begins, index, 0).cummax(1).values
    return Batch(tokens[:, :-1], targets, index - starts, documents)


def share(batch: Batch, layout: Layout, rank: int) -> Batch:
    """What a rank of the layout gets of it."""

    def own(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.chunk(layout.data_width)[layout.data_rank(rank)]

    inputs, targets = own(batch.inputs), own(batch.targets)
    assert inputs is not None
    assert targets is not None
    return Batch(inputs, targets, own(batch.positions), own(batch.documents))


def single(case: Case) -> tuple[Decoder, Tensor]:
    """The model after forward and backward of the whole batch in one go, and the sums of cross entropy and z-loss."""
    model = Decoder(case.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, case.config, SEED, CPU))
    batch = global_batch(case)
    logits = model(batch.inputs, batch.positions, batch.documents)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=IGNORE)
    z_loss = Z_LOSS * (torch.logsumexp(logits, -1) ** 2)[batch.targets != IGNORE].sum()
    torch.autograd.backward((cross_entropy + z_loss) / batch.tokens)
    return model, torch.stack([cross_entropy.detach(), z_loss.detach()])


def build(case: Case) -> Engine:
    """The engine on this rank, with the same weights as ``single``."""
    meshes = Meshes.build(case.layout, CPU)
    stages = parts_of(case.layout, meshes.at.pipeline, modelled_costs(case.config, case.length))
    parts = build_parts(case.config, case.layout, meshes, device=CPU, stages=stages, **case.options)
    initialize(parts, SEED)
    return Engine(
        parts,
        case.layout,
        meshes,
        Loss(Z_LOSS, meshes.tensor.get_group() if case.layout.tensor > 1 else None),
        micro_batch_size=case.micro_batch_size,
        device=CPU,
        dtype=torch.float64,
    )


def compare(case: Case, *, then: Callable[[Engine, Decoder], None] | None = None) -> Callable[[int], None]:
    """Body of a rank: sums and every gradient by name against the single process; then ``then``."""

    def body(rank: int) -> None:
        torch.set_default_dtype(torch.float64)
        reference, sums = single(case)
        engine = build(case)
        batch = global_batch(case)
        for _ in range(2):  # the second time with what the first one set up
            for _, parameter in engine.named_parameters():
                parameter.grad = None
            totals = engine.forward_backward(share(batch, case.layout, rank), batch.tokens)
            dist.all_reduce(totals)
            torch.testing.assert_close(totals, sums, rtol=1e-12, atol=0)
            check_gradients(engine, reference)
        if then is not None:
            then(engine, reference)

    return body


def check_gradients(engine: Engine, reference: Decoder) -> None:
    """Every gradient on this rank agrees with the single process to 1e-9, and no parameter of the model is missing."""
    expected = dict(reference.named_parameters())
    for name, parameter in engine.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        right = expected[name].grad
        assert right is not None
        error = (whole(parameter.grad) - right).norm() / right.norm()
        assert float(error) < 1e-9, f"{name} is off by {float(error):.2g}"
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, [name for name, _ in engine.named_parameters()])
    assert {name for own in names for name in own} == set(expected)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
