"""Verdicts of ring replay: the unit that is wrong is named and no other, and nobody where nobody can know.

A small model of the computations decides what the ranks find: each unit may spoil each of its computations at a point,
and two spoiled computations never agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations, product

import pytest

from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.replay.compare import FIRST, Difference, Verdict, arbiters, judge
from lockstep_trainer.replay.points import Order, Point, order
from lockstep_trainer.replay.units import Units

DOWN = Point(0, "forward", "blocks.0.ffn.down", local=True)
BEHIND = Point(0, "forward", "blocks.0.ffn", local=False)
WEIGHT = Point(0, "backward", "blocks.0.ffn.down.weight", local=True)
POINTS = (DOWN, BEHIND, WEIGHT)

Spoils = Callable[[int, int, int], Mapping[int, Point]]
"""(unit, micro-batch, how often this unit computed it before) → rank of the unit → where its values are first wrong."""


def found(units: Units, spoils: Spoils) -> list[dict[tuple[int, int], Difference]]:
    offsets = FIRST + arbiters(units.number) if units.number > 1 else (0, 0, 0)
    rows: list[dict[tuple[int, int], Difference]] = []
    for rank in range(units.layout.world_size):
        mine = units.unit(rank)
        wrong: list[Point | None] = []
        for number, offset in enumerate(offsets):
            unit = (mine + offset) % units.number
            again = offsets[:number].count(offset)
            wrong.append(spoils(unit, mine, again).get(units.counterpart(rank, offset)))
        differ = {}
        for first, second in combinations(range(len(offsets)), 2):
            points = [point for point in (wrong[first], wrong[second]) if point is not None]
            if points:
                at = min(order(point, POINTS.index(point)) for point in points)
                differ[first, second] = Difference(POINTS[at.position], at)
        rows.append(differ)
    return rows


def always(rank: int, point: Point, units: Units, *spread: tuple[int, Point]) -> Spoils:
    """A rank that is always wrong, and what other ranks of its unit see of it."""

    def spoils(unit: int, micro_batch: int, again: int) -> Mapping[int, Point]:
        return {rank: point, **dict(spread)} if unit == units.unit(rank) else {}

    return spoils


def once(rank: int, micro_batch: int, again: int, point: Point, units: Units) -> Spoils:
    """A rank that is wrong in one computation."""

    def spoils(unit: int, of: int, before: int) -> Mapping[int, Point]:
        return {rank: point} if (unit, of, before) == (units.unit(rank), micro_batch, again) else {}

    return spoils


def test_computations_that_agree_give_no_verdict() -> None:
    for width in range(1, 6):
        units = Units(Layout(shard=width))
        assert judge(units, found(units, lambda *_: {})) == ()


@pytest.mark.parametrize("width", range(3, 8))
def test_a_unit_that_is_always_wrong_is_named(width: int) -> None:
    units = Units(Layout(shard=width))
    for rank, point in product(range(width), POINTS):
        (verdict,) = judge(units, found(units, always(rank, point, units)))
        assert (verdict.kind, verdict.unit, verdict.ranks, verdict.point) == ("permanent", rank, (rank,), point)
        assert verdict.confidence == 1.0


@pytest.mark.parametrize("width", range(3, 8))
def test_a_unit_that_is_wrong_once_is_named_whether_in_the_step_the_replay_or_the_arbiter(width: int) -> None:
    units = Units(Layout(shard=width))
    for rank, offset in product(range(width), (0, 1, 2)):
        (verdict,) = judge(units, found(units, once(rank, (rank - offset) % width, 0, DOWN, units)))
        assert (verdict.kind, verdict.unit, verdict.ranks) == ("intermittent", rank, (rank,))
        assert verdict.confidence == pytest.approx(1 / 3)


@pytest.mark.parametrize("width", range(5, 8))
def test_two_units_that_are_always_wrong_are_both_named(width: int) -> None:
    units = Units(Layout(shard=width))
    for first, second in combinations(range(width), 2):

        def both(unit: int, *_: int, pair: tuple[int, int] = (first, second)) -> Mapping[int, Point]:
            return {unit: DOWN} if unit in pair else {}

        assert {verdict.unit for verdict in judge(units, found(units, both))} == {first, second}


def test_three_units_of_which_two_are_wrong_accuse_nobody() -> None:
    units = Units(Layout(shard=3))
    (verdict,) = judge(units, found(units, lambda unit, *_: {unit: DOWN} if unit else {}))
    assert (verdict.kind, verdict.unit, verdict.confidence) == ("undecided", None, 0.0)


@pytest.mark.parametrize("again", [0, 1])
def test_of_two_units_the_one_that_disagrees_with_itself_is_named(again: int) -> None:
    units = Units(Layout(shard=2))
    for rank, micro_batch in product((0, 1), (0, 1)):
        (verdict,) = judge(units, found(units, once(rank, micro_batch, again, WEIGHT, units)))
        assert (verdict.kind, verdict.unit, verdict.ranks) == ("intermittent", rank, (rank,))
        assert verdict.confidence == 0.5


def test_of_two_units_that_repeat_themselves_neither_is_named() -> None:
    """Two spoiled computations that are equal: a fault that always does the same."""
    units = Units(Layout(shard=2, tensor=2))
    rows = found(units, always(3, DOWN, units))
    same = [{pair: difference for pair, difference in row.items() if sum(pair) % 2} for row in rows]
    (verdict,) = judge(units, same)
    assert (verdict.kind, verdict.unit) == ("undecided", None)
    assert verdict.ranks == (1, 3), "the place within the unit is known, the unit is not"


def test_a_single_unit_shows_what_comes_and_goes() -> None:
    units = Units(Layout(tensor=2))
    assert units.number == 1
    for again in range(3):
        (verdict,) = judge(units, found(units, once(1, 0, again, DOWN, units)))
        assert (verdict.kind, verdict.unit, verdict.ranks) == ("intermittent", 0, (1,))


@pytest.mark.parametrize(
    "layout", [Layout(shard=3, tensor=2), Layout(shard=4, tensor=4), Layout(replicate=3, tensor=2)]
)
def test_the_rank_is_named_where_its_own_values_were_wrong_before_the_others_saw_them(layout: Layout) -> None:
    units = Units(layout)
    for rank in range(layout.world_size):
        others = [(other, BEHIND) for other in units.ranks(units.unit(rank)) if other != rank]
        (verdict,) = judge(units, found(units, always(rank, DOWN, units, *others)))
        assert verdict.named
        assert verdict.ranks == (rank,)


def test_only_the_group_is_named_where_a_sum_over_ranks_is_the_first_that_is_wrong() -> None:
    units = Units(Layout(shard=3, tensor=2, pipeline=2))
    for rank in range(units.layout.world_size):
        stage = units.layout.coordinates(rank).pipeline
        point = Point(stage, "forward", "blocks.0.ffn", local=False)
        rows = _at_one_point(units, rank, point)
        (verdict,) = judge(units, rows)
        assert not verdict.named
        assert verdict.unit == units.unit(rank)
        assert verdict.ranks == units.on_stage(units.unit(rank), stage)


def test_only_the_group_is_named_where_two_ranks_are_wrong_at_the_same_point() -> None:
    units = Units(Layout(shard=3, tensor=2))
    (verdict,) = judge(units, found(units, always(2, DOWN, units, (3, DOWN))))
    assert verdict.ranks == (2, 3)


def test_the_stage_that_is_wrong_first_is_named_forward_and_backward() -> None:
    """What a stage spoils, all stages behind it in the direction of the pass see."""
    units = Units(Layout(shard=3, pipeline=3))
    backward = [order(Point(stage, "backward", "w", local=True), 9) for stage in (2, 1, 0)]
    forward = [
        order(Point(stage, "forward", "x", local=True), position) for stage, position in ((0, 5), (1, 0), (2, 0))
    ]
    assert sorted([*backward, *forward]) == [*forward, *backward]
    for stage in range(3):
        rows: list[dict[tuple[int, int], Difference]] = [{} for _ in range(units.layout.world_size)]
        for pipeline in range(stage, 3):
            point = Point(pipeline, "forward", "x", local=True)
            for micro_batch, pairs in _votes_against(1):
                rank = next(r for r in units.on_stage(micro_batch, pipeline))
                rows[rank] = dict.fromkeys(pairs, Difference(point, order(point, 0)))
        (verdict,) = judge(units, rows)
        assert verdict.ranks == units.on_stage(1, stage)


def _votes_against(unit: int) -> list[tuple[int, tuple[tuple[int, int], tuple[int, int]]]]:
    """Micro-batches of three units, and the pairs that differ where ``unit`` is always wrong."""
    pairs = {0: ((0, 1), (0, 2)), 1: ((0, 1), (1, 2)), 2: ((0, 2), (1, 2))}
    return [((unit - offset) % 3, pairs[offset]) for offset in range(3)]


def _at_one_point(units: Units, rank: int, point: Point) -> list[dict[tuple[int, int], Difference]]:
    rows: list[dict[tuple[int, int], Difference]] = [{} for _ in range(units.layout.world_size)]
    for micro_batch, pairs in _votes_against(units.unit(rank)):
        seen = units.counterpart(rank, micro_batch - units.unit(rank))
        rows[seen] = dict.fromkeys(pairs, Difference(point, order(point, 3)))
    return rows


def test_a_verdict_says_what_it_goes_by() -> None:
    units = Units(Layout(shard=4))
    (verdict,) = judge(units, found(units, always(2, DOWN, units)))
    assert verdict == Verdict(
        "permanent",
        2,
        (2,),
        DOWN,
        1.0,
        "unit 2 was outvoted by two other units in 3 of 3 computations (micro-batches of unit 0, 1, 2), first at "
        "blocks.0.ffn.down (forward, stage 0)",
    )


def test_orders_go_through_a_rank_in_the_order_of_its_points() -> None:
    assert order(DOWN, 0) < order(BEHIND, 1) < order(WEIGHT, 2)
    assert order(WEIGHT, 2) == Order(True, 0, 2)
