"""Units of ring replay partition the ranks, hold what exchanges activations together, and have counterparts; and which
steps are replayed is the same for all."""

from __future__ import annotations

import math

import pytest

from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.replay.sampling import SUSPICIOUS_STEPS, Sampling
from lockstep_trainer.replay.units import Units

LAYOUTS = [
    Layout(),
    Layout(shard=4),
    Layout(replicate=2, shard=2),
    Layout(replicate=2, shard=3, context=2, tensor=2, pipeline=2),
    Layout(shard=8, expert=4),
    Layout(replicate=2, shard=4, tensor=2, expert=4),
    Layout(shard=2, context=2, tensor=2, expert=2),
    Layout(shard=6, tensor=2, expert=3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_unit_holds_all_that_its_ranks_exchange_activations_with(layout: Layout) -> None:
    units = Units(layout)
    assert sorted(rank for unit in range(units.number) for rank in units.ranks(unit)) == list(range(layout.world_size))
    stage_ranks = layout.world_size // layout.pipeline
    for rank in range(layout.world_size):
        at, unit = layout.coordinates(rank), units.unit(rank)
        experts = rank % stage_ranks // layout.expert
        for other in range(layout.world_size):
            there = layout.coordinates(other)
            same_data = (at.replicate, at.shard) == (there.replicate, there.shard)
            same_experts = at.pipeline == there.pipeline and other % stage_ranks // layout.expert == experts
            if same_data or (layout.expert > 1 and same_experts):
                assert units.unit(other) == unit


def test_units_are_no_larger_than_they_must_be() -> None:
    assert [Units(layout).number for layout in LAYOUTS] == [1, 4, 4, 6, 2, 4, 2, 2]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_counterparts_have_the_same_place_in_the_next_unit(layout: Layout) -> None:
    units = Units(layout)
    for distance in (0, 1, 2):
        counterparts = [units.counterpart(rank, distance) for rank in range(layout.world_size)]
        assert sorted(counterparts) == list(range(layout.world_size))
        for rank, other in enumerate(counterparts):
            assert units.unit(other) == (units.unit(rank) + distance) % units.number
            mine, theirs = units.ranks(units.unit(rank)), units.ranks(units.unit(other))
            assert mine.index(rank) == theirs.index(other)
            at, there = layout.coordinates(rank), layout.coordinates(other)
            assert (at.pipeline, at.context, at.tensor) == (there.pipeline, there.context, there.tensor)
            assert units.counterpart(other, -distance) == rank


def test_stages_of_a_unit_are_on_its_own_ranks() -> None:
    units = Units(Layout(shard=2, tensor=2, pipeline=2, schedule="Interleaved1F1B", stages_per_rank=2))
    assert units.on_stage(1, 0) == units.on_stage(1, 2) == (2, 3)
    assert units.on_stage(1, 1) == units.on_stage(1, 3) == (6, 7)


def test_a_share_of_the_steps_is_sampled_and_a_larger_share_includes_it() -> None:
    small, large = Sampling(7, 0.01), Sampling(7, 0.2)
    steps = range(1, 40_001)
    sampled = {step for step in steps if small.includes(step)}
    assert math.isclose(len(sampled), 400, rel_tol=0.2)
    assert sampled < {step for step in steps if large.includes(step)}
    assert sampled != {step for step in steps if Sampling(8, 0.01).includes(step)}
    assert all(Sampling(7, 1.0).includes(step) for step in range(100))
    assert not any(Sampling(7, 0.0).includes(step) for step in range(100))


def test_a_suspicion_raises_the_share_and_passes() -> None:
    suspecting = Sampling(1, 0.0025, suspected_at=100)
    assert suspecting.share_at(99) == suspecting.share_at(100) == suspecting.share_at(100 + SUSPICIOUS_STEPS) == 0.1
    assert suspecting.share_at(101 + SUSPICIOUS_STEPS) == 0.0025
    assert Sampling(1, 0.5, suspected_at=100).share_at(100) == 0.5


def test_a_step_in_doubt_is_replayed_whatever_the_share() -> None:
    doubting = Sampling(1, 0.0, doubted=30)
    assert [step for step in range(100) if doubting.includes(step)] == [30]
