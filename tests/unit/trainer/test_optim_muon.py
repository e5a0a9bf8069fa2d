"""Muon: torch's own on plain matrices, the same update at every layout, and each rank does its share of the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from forked import run_ranks
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.checkpoint.state import training_state
from lockstep_trainer.optim import spread
from lockstep_trainer.optim.build import build_optimizer, set_learning_rate
from lockstep_trainer.optim.muon import Muon, is_hidden_matrix, muon, orthogonalize

SPEC = OptimizerSpec(name="muon", lr=0.02, weight_decay=0.1, momentum=0.9)
SHAPES = {
    "embedding.weight": (11, 6),
    "blocks.0.attention.query.weight": (7, 5),
    "blocks.0.ffn.up.weight": (9, 4),
    "blocks.1.ffn.up.weight": (9, 4),
    "blocks.1.ffn.down.weight": (4, 9),
    "blocks.1.attention.query_norm.weight": (5,),
    "blocks.2.ffn.router.weight": (4, 5),
    "blocks.2.ffn.experts.up": (4, 6, 5),
    "blocks.2.ffn.experts.down": (3, 5, 6),  # no multiple of the ranks
    "head.weight": (11, 6),
}


class Flat:
    """Parameters under dotted names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: nn.Parameter(value) for name, value in tensors.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.tensors.items())

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return training_state(self.tensors, self.named_parameters(), optimizer)


def values(step: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in SHAPES.items()}


def train(flat: Flat, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> None:
    for step in steps:
        set_learning_rate(optimizer, SPEC.lr / step)
        for name, gradient in values(step).items():
            parameter = flat.tensors[name]
            if isinstance(parameter, DTensor):
                gradient = placed(gradient, parameter.device_mesh, parameter.placements)  # noqa: PLW2901
            parameter.grad = gradient
        optimizer.step()


def placed(value: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def trained_whole(steps: Sequence[int] = (1, 2, 3)) -> dict[str, Tensor]:
    flat = Flat(values(0))
    train(flat, build_optimizer(flat.named_parameters(), SPEC), steps)
    return {name: p.detach() for name, p in flat.tensors.items()}


def test_matrices_get_torchs_muon_and_the_rest_adamw() -> None:
    flat, other = Flat(values(0)), Flat(values(0))
    optimizer = muon(list(flat.tensors.items()), SPEC, dtype=torch.bfloat16)
    hidden = {name: p for name, p in other.tensors.items() if is_hidden_matrix(name, p)}
    assert set(SHAPES) - set(hidden) == {
        "embedding.weight",
        "head.weight",
        "blocks.2.ffn.router.weight",
        "blocks.1.attention.query_norm.weight",
    }
    matrices = [p for p in hidden.values() if p.ndim == 2]
    theirs = torch.optim.Muon(matrices, lr=SPEC.lr, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    plain = [other.tensors[name] for name in ("embedding.weight", "blocks.1.attention.query_norm.weight")]
    groups: list[dict[str, Any]] = [
        {"params": [other.tensors[name] for name in ("head.weight", "blocks.2.ffn.router.weight")]},
        {"params": plain, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=SPEC.lr, weight_decay=0.1, betas=(0.9, 0.95))
    for step in (1, 2, 3):
        for name, gradient in values(step).items():
            flat.tensors[name].grad, other.tensors[name].grad = gradient, gradient.clone()
        for each in (optimizer, theirs, adamw):
            each.step()
    for name, parameter in other.tensors.items():
        if parameter.ndim == 2 and name in hidden:  # rounded to bfloat16 on the way: 2⁻⁸ of an update of 0.02 · 0.6
            torch.testing.assert_close(flat.tensors[name], parameter, rtol=0, atol=3e-4)
        elif name not in hidden:
            torch.testing.assert_close(flat.tensors[name], parameter, rtol=1e-12, atol=1e-14)


def test_a_stack_is_its_matrices() -> None:
    stack = values(1)["blocks.2.ffn.experts.up"]
    for whole, matrix in zip(orthogonalize(stack), stack, strict=True):
        torch.testing.assert_close(whole, orthogonalize(matrix[None])[0], rtol=1e-12, atol=1e-14)
    singular = torch.linalg.svdvals(orthogonalize(stack))
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3


MATRICES = ("blocks.0.attention.query.weight", "blocks.0.ffn.up.weight", "blocks.1.ffn.down.weight")
LAYOUTS: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    # shape of the mesh, placements of matrices (and vectors), of stacks
    "fsdp": ((4,), [Shard(0)], [Shard(0)]),
    "copies": ((2, 2), [Replicate(), Shard(0)], [Replicate(), Shard(1)]),
    "fsdp within tensor, rows": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], [Shard(1), Shard(0)]),
    "fsdp and tensor, columns": ((2, 2), [Shard(0), Shard(1)], [Shard(2), Shard(1)]),
    "plain shards of rows twice": ((2, 2), [Shard(0), Shard(0)], [Shard(1), Shard(1)]),
    "nothing cut": ((2, 2), [Replicate(), Replicate()], [Replicate(), Replicate()]),
}


def sharded(layout: str) -> Flat:
    shape, matrices, stacks = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    tensors: dict[str, Tensor] = {}
    for name, value in values(0).items():
        plain = [Shard(0)] + [Replicate()] * (len(shape) - 1)
        placements = stacks if value.ndim == 3 else matrices if value.ndim == 2 else plain
        tensors[name] = placed(value, mesh, placements)
    return Flat(tensors)


def test_the_update_is_that_of_whole_matrices_at_every_layout() -> None:
    expected = trained_whole()

    def compare(rank: int) -> None:
        for layout in LAYOUTS:
            flat = sharded(layout)
            train(flat, build_optimizer(flat.named_parameters(), SPEC), (1, 2, 3))
            for name, parameter in flat.tensors.items():
                assert isinstance(parameter, DTensor)
                own = placed(expected[name], parameter.device_mesh, parameter.placements).to_local()
                error = (parameter.to_local() - own).norm() / own.norm().clamp(min=1e-300)
                assert float(error.detach()) <= 1e-12, (layout, name)

    run_ranks(4, compare)


def test_fsdp_over_tensor_parallel_layers_as_torch_makes_them() -> None:
    """Layouts as they come from fully_shard over parallelize_module, with sizes that do not divide."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)).double()

    def compare(rank: int) -> None:
        whole, split = model(), model()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        parallelize_module(split, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(split, mesh=mesh["shard"])
        optimizers = [build_optimizer(each.named_parameters(), SPEC) for each in (whole, split)]
        for _ in range(2):
            for (_, p), (_, q) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
                assert isinstance(q, DTensor)
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(5), dtype=p.dtype)
                q.grad = placed(p.grad, q.device_mesh, q.placements)
            for optimizer in optimizers:
                optimizer.step()
        for (_, p), (_, q) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
            assert isinstance(q, DTensor)
            torch.testing.assert_close(q.full_tensor(), p, rtol=1e-12, atol=1e-14)

    run_ranks(4, compare)


def test_each_rank_works_on_its_share() -> None:
    """Eight equal matrices on four ranks are two for each, on one axis and on two."""

    def count(rank: int) -> None:
        for shape, placements in (((4,), [Shard(0)]), ((2, 2), [Shard(0), Shard(1)])):
            mesh = init_device_mesh("cpu", shape)
            shards = [placed(torch.full((8, 8), float(n)), mesh, placements) for n in range(8)]
            worked: list[float] = []

            def work(matrices: Tensor, worked: list[float] = worked) -> Tensor:
                worked.extend(float(matrix[0, 0]) for matrix in matrices)
                assert all(bool((matrix == matrix[0, 0]).all()) for matrix in matrices)
                return matrices + 1

            ways = [spread.way_of(each) for each in shards]
            results = spread.on_whole([each.to_local() for each in shards], ways, work)
            assert len(worked) == 2
            assert all(bool((result == number + 1).all()) for number, result in enumerate(results))
            everyone: list[Any] = [None] * 4
            dist.all_gather_object(everyone, worked)
            assert sorted(n for each in everyone for n in each) == [float(n) for n in range(8)]

    run_ranks(4, count)


def test_a_shard_that_is_not_understood_is_refused() -> None:
    def build(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        odd = DTensor.from_local(
            torch.zeros(1 if rank else 5, 4), mesh, [Shard(0)], run_check=False, shape=torch.Size((6, 4)), stride=(4, 1)
        )
        with pytest.raises(ValueError, match="is not understood"):
            spread.way_of(odd)

    run_ranks(2, build)


def test_a_checkpoint_goes_on_at_another_layout(tmp_path: Path) -> None:
    expected = trained_whole((1, 2, 3))

    def save(rank: int) -> None:
        flat = sharded("fsdp within tensor, rows")
        optimizer = build_optimizer(flat.named_parameters(), SPEC)
        train(flat, optimizer, (1, 2))
        dcp.save(flat.state(optimizer), checkpoint_id=tmp_path)

    def resume(rank: int) -> None:
        flat = sharded("fsdp and tensor, columns")
        optimizer = build_optimizer(flat.named_parameters(), SPEC)
        assert isinstance(optimizer, Muon)
        dcp.load(flat.state(optimizer), checkpoint_id=tmp_path)
        train(flat, optimizer, (3,))
        for name, parameter in flat.tensors.items():
            assert isinstance(parameter, DTensor)
            torch.testing.assert_close(parameter.full_tensor(), expected[name], rtol=1e-12, atol=1e-14)

    run_ranks(4, save)
    run_ranks(4, resume)
