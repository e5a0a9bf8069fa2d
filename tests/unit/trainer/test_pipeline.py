"""Stages: the split is the best there is, every layer is on one rank, and schedules get what they can do."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

from composed import CPU
from forked import run_ranks
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.presets import PRESETS
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.measured import measured_costs
from lockstep_trainer.parallel.pipeline import parts_of
from lockstep_trainer.parallel.stages import Costs, costs_by_count, modelled_costs, split_layers

CONFIG = DecoderConfig(dim=64, layers=8, heads=4, kv_heads=2, ffn_dim=128, vocab_size=512)


def stage_costs(costs: Costs, split: list[range]) -> list[float]:
    stages = [sum(costs.layers[layer] for layer in stage) for stage in split]
    stages[0] += costs.embedding
    stages[-1] += costs.head
    return stages


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_has_a_cheaper_dearest_stage_or_is_as_cheap_and_more_even(seed: int) -> None:
    draw = random.Random(seed)
    layers, stages = draw.randint(1, 9), draw.randint(1, 4)
    stages = min(stages, layers)
    costs = Costs(draw.random(), tuple(float(draw.randint(1, 5)) for _ in range(layers)), draw.random() * 8)
    split = split_layers(costs, stages)
    assert [layer for stage in split for layer in stage] == list(range(layers))
    found = stage_costs(costs, split)
    others = []
    for bounds in combinations(range(1, layers), stages - 1):
        ends = (0, *bounds, layers)
        others.append(stage_costs(costs, [range(a, b) for a, b in pairwise(ends)]))
    dearest = min(max(other) for other in others)
    assert max(found) == pytest.approx(dearest)
    evenest = min(sum(c * c for c in other) for other in others if max(other) <= dearest * (1 + 1e-9))
    assert sum(c * c for c in found) == pytest.approx(evenest)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 layers don't make 3 stages"):
        split_layers(Costs(0.0, (1.0, 1.0), 0.0), 3)


def test_a_large_head_leaves_the_last_stage_fewer_layers() -> None:
    """Llama 3 8B on 4 stages: the head is worth several layers, which a split by count does not see."""
    config = PRESETS["llama3-8b"].config
    by_count = split_layers(costs_by_count(config), 4)
    modelled = split_layers(modelled_costs(config, 8192), 4)
    assert [len(stage) for stage in by_count] == [8, 8, 8, 8]
    assert len(modelled[-1]) < 8
    costs = modelled_costs(config, 8192)
    assert max(stage_costs(costs, modelled)) < max(stage_costs(costs, by_count))


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_each_layer_and_each_end_is_on_one_rank(schedule: str) -> None:
    layout = Layout(pipeline=4, schedule=schedule, stages_per_rank=1 if schedule == "1F1B" else 2)
    parts = [part for rank in range(4) for part in parts_of(layout, rank, costs_by_count(CONFIG))]
    assert sorted(layer for part in parts for layer in part.layers) == list(range(8))
    assert [sum(part.first for part in parts), sum(part.last for part in parts)] == [1, 1]
    on_first = parts_of(layout, 0, costs_by_count(CONFIG))
    assert any(part.last for part in on_first) == (schedule == "ZBVZeroBubble")


@pytest.mark.parametrize(
    ("schedule", "numbers", "wrong", "following"),
    [
        ("GPipe", (1, 3, 4), 0, 1),
        ("1F1B", (4, 5, 7), 3, 4),
        ("Interleaved1F1B", (1, 3, 4, 8, 10), 9, 10),
        ("ZBVZeroBubble", (1, 4, 5), 0, 1),
        ("DualPipeV", (8, 9), 7, 8),
    ],
)
def test_micro_batches_that_a_schedule_can_not_do_are_refused(
    schedule: str, numbers: tuple[int, ...], wrong: int, following: int
) -> None:
    layout = Layout(pipeline=4, schedule=schedule, stages_per_rank=1 if schedule in ("GPipe", "1F1B") else 2)
    for number in numbers:
        layout.check_micro_batches(number)
    with pytest.raises(UserError, match=f"the next number it can do is {following}"):
        layout.check_micro_batches(wrong)


def test_what_was_measured_before_counts() -> None:
    """Another split of the layers would make the snapshots in memory unusable. Rank 0 says what it knows."""
    known = (1.0, *(float(layer) for layer in range(8)), 3.0)

    def body(rank: int) -> None:
        for before, taken in ((known if rank == 0 else None, True), (known[:-1], False)):
            costs = measured_costs(
                CONFIG,
                Layout(pipeline=2),
                device=CPU,
                precision="fp32",
                recompute="none",
                micro_batch_size=1,
                sequence_length=16,
                before=before,
            )
            assert (costs.numbers() == known) == taken, "those of another number of layers say nothing"

    run_ranks(2, body)


def test_measured_costs_are_the_same_on_all_ranks_and_disturb_no_random_numbers() -> None:
    mixture = replace(CONFIG, experts=4, expert_dim=32, dense_layers=2)

    def body(rank: int) -> None:
        before = torch.get_rng_state()
        costs = measured_costs(
            mixture,
            Layout(pipeline=2),
            device=CPU,
            precision="fp32",
            recompute="full",
            micro_batch_size=1,
            sequence_length=64,
        )
        assert torch.equal(before, torch.get_rng_state())
        everyone: list[Costs | None] = [None, None]
        torch.distributed.all_gather_object(everyone, costs)
        assert everyone[0] == everyone[1]
        assert len(costs.layers) == 8
        assert costs.layers[0] == costs.layers[1] != costs.layers[2] == costs.layers[7]
        assert min(costs.embedding, costs.head, *costs.layers) > 0

    run_ranks(2, body)
