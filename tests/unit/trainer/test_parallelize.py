"""Fresh weights, buffers and meshes at any layout; that training is right there too is the parity matrix's business."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from forked import run_ranks
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.init import initial_weight
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize, reset_buffers
from lockstep_trainer.parallel.pipeline import parts_of
from lockstep_trainer.parallel.sharded import own_shard
from lockstep_trainer.parallel.stages import costs_by_count

CONFIG = DecoderConfig(
    dim=24,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn_dim=38,  # like the vocabulary no multiple of all ranks: shards are uneven
    vocab_size=134,
    tie_embeddings=True,
    qk_norm=True,
    experts=2,
    expert_dim=6,
    dense_layers=1,
)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(shard=3),
        Layout(replicate=2, shard=2),
        Layout(shard=2, tensor=2, expert=2),
        Layout(shard=2, pipeline=2, expert=2),
    ],
    ids=str,
)
def test_fresh_weights_do_not_depend_on_the_layout(layout: Layout) -> None:
    def compare(rank: int) -> None:
        meshes = Meshes.build(layout, CPU)
        stages = parts_of(layout, meshes.at.pipeline, costs_by_count(CONFIG))
        parts = build_parts(CONFIG, layout, meshes, device=CPU, stages=stages)
        initialize(parts, 7)
        for part in parts:
            for name, parameter in part.named_parameters():
                assert isinstance(parameter, DTensor)
                whole = initial_weight(name, parameter.shape, CONFIG, 7, CPU)
                assert torch.equal(parameter.to_local(), own_shard(whole, parameter))
                if name == "embedding.weight":  # whose rows two axes cut: torch agrees on which are whose
                    assert torch.equal(parameter.full_tensor(), whole)
            for name, buffer in part.named_buffers():
                assert not buffer.any(), name

    run_ranks(layout.world_size, compare)


def test_buffers_without_a_first_value_are_refused() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(TypeError, match=r"0 \(BatchNorm1d\) has buffers and no method reset_buffers"):
        reset_buffers(module)


def test_groups_are_shared_and_wait_as_long_as_the_job_says() -> None:
    def compare(rank: int) -> None:
        meshes = Meshes.build(Layout(shard=2, tensor=2, pipeline=2), CPU, timeout=timedelta(seconds=17))
        at = meshes.at
        assert meshes.at == Layout(shard=2, tensor=2, pipeline=2).coordinates(rank)
        assert dist.get_process_group_ranks(meshes.pipeline) == [rank % 4, rank % 4 + 4]
        assert meshes.tie is meshes.pipeline  # the same two ranks
        assert meshes.tensor.mesh.tolist() == [rank - at.tensor, rank - at.tensor + 1]
        assert meshes.fsdp.mesh.tolist() == [rank - 2 * at.shard, rank - 2 * at.shard + 2]
        assert meshes.expert_fsdp.size() == 4
        for group in (meshes.pipeline, meshes.tensor.get_group(), meshes.fsdp.get_group(), meshes.context):
            assert group._get_backend(CPU).options._timeout == timedelta(seconds=17)
        single = {meshes.context, meshes.dense.get_group("replicate"), meshes.expert.get_group()}
        assert len(single) == 1  # one group of one rank for all axes of size 1

    run_ranks(8, compare)


def test_a_world_of_another_size_is_refused() -> None:
    def compare(rank: int) -> None:
        with pytest.raises(ValueError, match="the layout has 4 ranks and the world 2"):
            Meshes.build(replace(Layout(), shard=4), CPU)

    run_ranks(2, compare)


def test_first_weights_have_the_published_deviations() -> None:
    embedding = initial_weight("embedding.weight", torch.Size((400, 64)), CONFIG, 7, CPU)
    assert float(embedding.std()) == pytest.approx(0.02, rel=0.05)
    down = initial_weight("blocks.0.ffn.down.weight", torch.Size((400, 64)), CONFIG, 7, CPU)
    assert float(down.std()) == pytest.approx(0.01, rel=0.05)
