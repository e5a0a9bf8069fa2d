"""Copies of the same shard that differ are told from computations that differ, and the odd one out is named."""

from __future__ import annotations

import pytest

from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.replay.copies import judge_copies
from lockstep_trainer.replay.units import Units

THREE_COPIES = Layout(replicate=3, shard=2, tensor=2)


def digests(layout: Layout, **others: int) -> list[int]:
    """By rank: one for each shard, but for ``r3=…``."""
    found = []
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        found.append(others.get(f"r{rank}", 1000 * at.pipeline + 100 * at.shard + 10 * at.context + at.tensor))
    return found


@pytest.mark.parametrize(
    "layout", [THREE_COPIES, Layout(replicate=2, shard=2, pipeline=2), Layout(shard=4), Layout(replicate=4)]
)
def test_equal_copies_blame_nobody(layout: Layout) -> None:
    assert judge_copies(Units(layout), digests(layout)) == ()


def test_with_three_copies_the_odd_one_is_named() -> None:
    (verdict,) = judge_copies(Units(THREE_COPIES), digests(THREE_COPIES, r6=7))
    assert (verdict.kind, verdict.unit, verdict.ranks) == ("permanent", 3, (6,))
    assert verdict.named


def test_two_odd_ones_of_different_shards_are_both_named() -> None:
    verdicts = judge_copies(Units(THREE_COPIES), digests(THREE_COPIES, r6=7, r1=7))
    assert [verdict.ranks for verdict in verdicts] == [(1,), (6,)]


def test_two_copies_that_differ_are_undecided() -> None:
    layout = Layout(replicate=2, shard=2)
    (verdict,) = judge_copies(Units(layout), digests(layout, r1=7))
    assert (verdict.kind, verdict.unit, verdict.ranks, verdict.confidence) == ("undecided", None, (1, 3), 0.0)


def test_three_copies_that_all_differ_are_undecided() -> None:
    (verdict,) = judge_copies(Units(THREE_COPIES), digests(THREE_COPIES, r0=7, r4=8))
    assert (verdict.kind, verdict.ranks) == ("undecided", (0, 4, 8))


def test_the_place_is_on_the_ranks_own_stage() -> None:
    layout = Layout(replicate=3, pipeline=2)
    (verdict,) = judge_copies(Units(layout), digests(layout, r4=7))
    assert verdict.point.stage == 1
