"""Memory by formula: activations are what autograd keeps, and shards add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Block
from lockstep_trainer.model.memory import (
    Work,
    layer_activations,
    memory_by_pipeline_rank,
    micro_batches_in_flight,
    stored_elements,
)
from lockstep_trainer.model.positions import rotation
from lockstep_trainer.model.presets import PRESETS
from lockstep_trainer.model.weights import parameter_count, weights
from lockstep_trainer.parallel.layout import Layout

# LayerNorm keeps its input on all devices. RMSNorm does so as one kernel on GPUs, and keeps a copy on CPUs.
SMALL = DecoderConfig(dim=128, layers=1, heads=8, kv_heads=4, ffn_dim=384, vocab_size=50, norm="layer")
LLAMA = PRESETS["llama3-8b"].config


def kept_by_autograd(config: DecoderConfig, tokens: int) -> int:
    """Bytes that a block's forward pass keeps for its backward pass, weights and rotations excluded."""
    block = Block(config, 0)
    rope = rotation(torch.arange(tokens), config, torch.float32) if config.positions == "rope" else None
    known = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *(rope or ()))}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = block(torch.randn(1, tokens, config.dim, requires_grad=True), rope, None)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, qk_norm=True, activation="reglu"),
        replace(SMALL, activation="gelu", positions="learned"),
        replace(SMALL, activation="relu"),
        replace(SMALL, experts=4, expert_dim=96),
        replace(SMALL, experts=4, expert_dim=96, shared_expert_dim=128, activation="geglu"),
    ],
)
def test_activations_by_formula_are_what_autograd_keeps(config: DecoderConfig) -> None:
    by_formula = layer_activations(config, 0, Layout(), "none", 4) * 64
    assert kept_by_autograd(config, 64) == pytest.approx(by_formula, rel=0.02)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama3-8b", Layout(shard=4, tensor=2)),
        ("llama3-1b", Layout(replicate=2, shard=2, context=2)),
        ("qwen3-30b-a3b", Layout(shard=4, tensor=2, expert=4)),
    ],
)
def test_the_shards_of_one_copy_add_up_to_the_model(name: str, layout: Layout) -> None:
    """Norms, router and their like are on all tensor ranks: less than a thousandth of the whole."""
    config = PRESETS[name].config
    stored = sum(stored_elements(weight, layout) for weight in weights(config))
    ranks = layout.shard * layout.context * layout.tensor
    assert stored * ranks == pytest.approx(parameter_count(config), rel=1e-3)
    assert stored * ranks >= parameter_count(config)


def test_the_items_of_a_plain_layout() -> None:
    count = parameter_count(LLAMA)
    (memory,) = memory_by_pipeline_rank(LLAMA, Layout(shard=8), Work(sequence_length=1024))
    assert memory.parameters == memory.gradients == pytest.approx(4 * count / 8, rel=1e-6)
    assert memory.optimizer == pytest.approx(8 * count / 8, rel=1e-6)
    assert memory.logits == 1024 * 128_256 * (2 + 2 + 4)
    (accumulated,) = memory_by_pipeline_rank(LLAMA, Layout(shard=8), Work(sequence_length=1024, micro_batches=2))
    assert accumulated.gradients == 4 * count
    (muon,) = memory_by_pipeline_rank(LLAMA, Layout(shard=8), Work(sequence_length=1024, optimizer="muon"))
    ends = 2 * 128_256 * 4096
    assert muon.optimizer == pytest.approx(4 * (count + ends) / 8, rel=1e-3)
    assert memory.total == sum(
        (memory.parameters, memory.gathered, memory.gradients, memory.optimizer, memory.activations, memory.logits)
    )


@pytest.mark.parametrize("name", ["llama3-8b", "qwen3-30b-a3b"])
def test_recomputing_more_keeps_less(name: str) -> None:
    config = PRESETS[name].config
    for layout in (Layout(), Layout(tensor=4)):
        kept = [layer_activations(config, 0, layout, mode, 2) for mode in ("none", "selective", "full")]
        assert kept[0] > 1.2 * kept[1] > 1.2**2 * kept[2]
        assert kept[2] == config.dim * 2 / layout.tensor


def test_activations_are_split_by_context_and_tensor_parallelism() -> None:
    def activations(layout: Layout) -> int:
        return memory_by_pipeline_rank(LLAMA, layout, Work(sequence_length=8192))[0].activations

    alone = activations(Layout())
    assert activations(Layout(context=4)) == pytest.approx(alone / 4)
    assert alone / 8 < activations(Layout(tensor=8)) < alone / 4  # the gathered inputs are not split


@pytest.mark.parametrize(
    ("schedule", "stages_per_rank", "first", "last"),
    [
        ("GPipe", 1, 16, 16),
        ("1F1B", 1, 4, 1),
        ("Interleaved1F1B", 2, 4 * (1 + 3 / 8), 2.5),
        ("ZBVZeroBubble", 2, 4, 4),
        ("DualPipeV", 2, 5, 5),
    ],
)
def test_a_schedule_keeps_as_many_micro_batches_as_published(
    schedule: str, stages_per_rank: int, first: float, last: float
) -> None:
    layout = Layout(pipeline=4, schedule=schedule, stages_per_rank=stages_per_rank)
    assert micro_batches_in_flight(layout, 16, 0) == pytest.approx(first)
    assert micro_batches_in_flight(layout, 16, 3) == pytest.approx(last)


def test_pipeline_ranks_hold_the_model_between_them() -> None:
    ranks = memory_by_pipeline_rank(LLAMA, Layout(pipeline=4), Work(sequence_length=4096, micro_batches=8))
    assert sum(rank.parameters for rank in ranks) == 4 * parameter_count(LLAMA)
    assert [rank.logits > 0 for rank in ranks] == [False, False, False, True]
    assert ranks[0].activations > 2 * ranks[2].activations
