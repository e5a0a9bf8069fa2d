"""Who keeps the others waiting: the sentence that a person reads names the right rank."""

from __future__ import annotations

from dataclasses import replace

from lockstep_api.messages import GroupCalls, Position
from lockstep_trainer.protocol.hangs import blame, group_alike

WORLD = "default_pg 1234"
INSIDE = ("distributed/distributed_c10d.py:4181 all_reduce", "lockstep_trainer/train.py:206 _totals")


def waiting(rank: int, *groups: tuple[str, int, int]) -> Position:
    """In a collective."""
    calls = tuple(GroupCalls(group, entered, done, "all_reduce") for group, entered, done in groups)
    return Position(rank, 6, "collective", "S", True, INSIDE, communicating=True, groups=calls)


def elsewhere(rank: int, *groups: tuple[str, int, int]) -> Position:
    """Not communicating."""
    place = ("data/loader.py:88 batch",)
    return replace(waiting(rank, *groups), section="load", frames=place, communicating=False)


def test_a_rank_that_never_joins_is_named_with_its_place_and_who_waits() -> None:
    found = blame([waiting(0, (WORLD, 8, 7)), elsewhere(1, (WORLD, 7, 7)), waiting(2, (WORLD, 8, 7))])
    assert found.ranks == (1,)
    assert found.sentence == (
        "rank 1 keeps the others waiting: it is in data/loader.py:88 batch (step 7, section load); it never joined "
        f"all_reduce number 8 of group {WORLD}, in which ranks 0, 2 wait"
    )
    assert [(late.rank, late.waiting) for late in found.late] == [(1, (0, 2))]


def test_a_stopped_process_outweighs_all_else() -> None:
    stopped = Position(3, 6, "forward", "T")
    found = blame([waiting(0, (WORLD, 8, 7)), elsewhere(1, (WORLD, 7, 7)), stopped])
    assert found.ranks == (3,)
    assert "its process is stopped (step 7, section forward)" in found.sentence


def test_an_interpreter_that_does_not_answer_is_named() -> None:
    found = blame([waiting(0, (WORLD, 8, 7)), Position(1, 6, "forward", "D")])
    assert found.ranks == (1,)
    assert "uninterruptible call of the kernel" in found.sentence


def test_the_root_of_the_wait_for_graph_is_named_not_who_waits_for_it() -> None:
    """Rank 1 is behind in a group with 0 since it waits in another one for rank 2, whose peer there is away."""
    found = blame(
        [
            waiting(0, ("rows", 5, 4)),
            waiting(1, ("rows", 4, 4), ("columns", 9, 8)),
            waiting(2, ("columns", 8, 8), ("lost", 3, 2)),
        ]
    )
    assert found.ranks == (2,)
    assert {(late.rank, late.group) for late in found.late} == {(1, "rows"), (2, "columns")}


def test_collectives_in_different_orders_and_a_lost_message_are_told_apart() -> None:
    crossed = blame([waiting(0, ("a", 2, 1), ("b", 1, 1)), waiting(1, ("a", 1, 1), ("b", 2, 1))])
    assert crossed.ranks == ()
    assert "different orders" in crossed.sentence
    lost = blame([waiting(0, (WORLD, 8, 7)), waiting(1, (WORLD, 8, 7))])
    assert lost.ranks == ()
    assert "none is behind" in lost.sentence
    assert "all_reduce" in lost.sentence
    assert blame([]).sentence == "no worker could be asked"


def test_ranks_in_one_place_are_told_once() -> None:
    places = group_alike([*(waiting(rank) for rank in (3, 0, 2)), elsewhere(1)])
    assert [place.ranks for place in places] == [(1,), (0, 2, 3)]
