"""The gradient's norm counts each element once, wherever it lies, and clipping scales all of them alike."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from forked import run_ranks
from lockstep_trainer.parallel.gradients import clip, squares
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes

CPU = torch.device("cpu")


def parameter(gradient: Tensor) -> nn.Parameter:
    """A parameter that has this gradient."""
    made = nn.Parameter(torch.zeros_like(gradient))
    made.grad = gradient
    return made


def test_norm_and_clipping_in_one_process() -> None:
    named = [("a", parameter(torch.tensor([3.0, 0, 0]))), ("b", parameter(torch.full((2, 2), 2.0)))]
    named.append(("unused", nn.Parameter(torch.zeros(4))))
    assert float(squares(named, Layout())) == 25.0
    for largest, expected in ((0.0, 5.0), (7.0, 5.0), (1.0, 1.0)):
        clip(named, 5.0, largest)
        assert math.sqrt(float(squares(named, Layout()))) == pytest.approx(expected)
    clip(named, math.inf, 1.0)
    assert math.sqrt(float(squares(named, Layout()))) == pytest.approx(1.0)


def test_squares_are_summed_in_float64() -> None:
    ones = parameter(torch.ones(2**24 + 3))  # float32 can't count so far
    assert float(squares([("ones", ones)], Layout())) == 2**24 + 3


def test_an_element_counts_once_on_mixed_meshes() -> None:
    layout = Layout(replicate=2, shard=2, tensor=2, expert=4)

    def compare(rank: int) -> None:
        meshes = Meshes.build(layout, CPU)
        dense = meshes.dense[("replicate", "fsdp", "tensor")]
        experts = meshes.experts[("replicate", "expert_shard", "expert")]
        cases: list[tuple[str, Tensor, tuple[Placement, ...]]] = [
            ("matrix", torch.arange(12.0).view(6, 2), (Replicate(), Shard(0), Shard(1))),
            ("norm", torch.arange(5.0), (Replicate(), Shard(0), Replicate())),  # uneven, and on both tensor ranks
            ("tiny", torch.ones(1), (Replicate(), Shard(0), Replicate())),  # nothing is left for the second shard
        ]
        named = [(name, sharded(whole, dense, placements)) for name, whole, placements in cases]
        whole = torch.arange(8.0).view(4, 2)
        named.append(("experts", sharded(whole, experts, (Replicate(), Shard(1), Shard(0)))))
        total = squares(named, layout)
        dist.all_reduce(total)
        expected = sum(float(gradient.square().sum()) for gradient in [whole, *(case[1] for case in cases)])
        assert float(total) == pytest.approx(expected, rel=1e-14)
        total = squares(named, layout, second_copies={"experts"})
        dist.all_reduce(total)
        assert float(total) == pytest.approx(expected - float(whole.square().sum()), rel=1e-14)

    run_ranks(8, compare)


def test_a_parameter_that_is_not_on_all_ranks_is_refused() -> None:
    def compare(rank: int) -> None:
        layout = Layout(shard=2, tensor=2)
        meshes = Meshes.build(layout, CPU)
        with pytest.raises(TypeError, match="plain is not sharded"):
            squares([("plain", parameter(torch.ones(2)))], layout)
        with pytest.raises(ValueError, match="half lies on 2 ranks of the 4"):
            squares([("half", sharded(torch.ones(4), meshes.tensor, (Shard(0),)))], layout)

    run_ranks(4, compare)


def sharded(gradient: Tensor, mesh: dist.DeviceMesh, placements: tuple[Placement, ...]) -> nn.Parameter:
    """A sharded parameter that has this gradient."""
    split: DTensor = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
    made = nn.Parameter(torch.zeros_like(split))
    made.grad = split
    return made
