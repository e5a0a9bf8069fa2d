"""Which copies a generation may start from, and who keeps copies for whom."""

from __future__ import annotations

from collections import Counter

import pytest

from lockstep_api.messages import Copies, MemoryPoint, Origin, RestorePoint, SlotInfo, StateId, Term
from lockstep_trainer.protocol.lineage import Holding, Lineage, buddies, newest_complete

FIRST, SECOND, THIRD = Term(1, 1), Term(1, 2), Term(2, 1)


def state(step: int, term: Term = FIRST) -> StateId:
    return StateId(step, term.epoch, term.generation)


def durable(step: int, term: Term = FIRST) -> RestorePoint:
    return RestorePoint(state(step, term), f"step-{step}", "sha")


def members(*domains: str) -> list[SlotInfo]:
    return [
        SlotInfo(slot, f"pod-{slot}", f"uid-{slot}", "boot", f"pod-{slot}:1", domain)
        for slot, domain in enumerate(domains)
    ]


def held(origin: Origin | None, *copies: tuple[StateId, int]) -> Holding:
    return Holding(origin, tuple(Copies(state, slot) for state, slot in copies))


def test_newest_state_that_all_slots_have_a_copy_of() -> None:
    """Step 30 lacks slot 1; step 20 has slot 1 at its buddy only."""
    origin = Origin(FIRST, 0)
    holdings = {
        0: held(origin, (state(30), 0), (state(20), 0), (state(20), 1), (state(10), 0)),
        1: held(origin, (state(10), 1)),
    }
    assert newest_complete(members("a", "b"), holdings, None) == MemoryPoint(state(20), ("", "pod-0:1"))
    assert newest_complete(members("a", "b"), holdings, None, [state(20)]) == MemoryPoint(state(10), ("", ""))
    nearer = MemoryPoint(state(20), ("", "pod-0:1"))
    assert newest_complete(members("a", "b"), holdings, durable(20)) == nearer, "the store has it, too"
    assert newest_complete(members("a", "b"), holdings, durable(21)) is None


def test_copies_that_others_have_dropped_are_of_no_lineage() -> None:
    """A pod that missed the second generation holds both slots' copies of what that went back behind."""
    away = held(Origin(FIRST, 0), (state(30), 0), (state(30), 1))
    assert newest_complete(members("a", "b"), {0: away, 1: held(Origin(FIRST, 0))}, None) is not None
    assert newest_complete(members("a", "b"), {0: away, 1: held(Origin(SECOND, 10))}, None) is None
    assert newest_complete(members("a", "b"), {0: away, 1: held(Origin(SECOND, 30))}, None) is not None


def test_a_snapshot_descends_from_what_is_durable() -> None:
    """Step 20 of the second generation is durable: step 30 of the first was left behind, whoever still has it."""
    both = {0: held(None, (state(30), 0), (state(30), 1)), 1: held(None)}
    assert newest_complete(members("a", "b"), both, durable(20)) is not None
    assert newest_complete(members("a", "b"), both, durable(20, SECOND)) is None


def test_the_sample_log_reaches_back_to_the_durable_state() -> None:
    """A log that begins behind step 20 has a gap where the chain ends at step 10."""
    holdings = {0: Holding(None, (Copies(state(30), 0, durable=20),))}
    assert newest_complete(members("a"), holdings, durable(10)) is None
    assert newest_complete(members("a"), holdings, durable(20)) is not None


def test_lineage_ends_where_a_later_generation_began() -> None:
    """The second generation began at step 20, the third at its step 30."""
    lineage = Lineage().grown(FIRST, None).grown(SECOND, state(20)).grown(THIRD, state(30, SECOND))
    assert lineage.holds(state(20))
    assert not lineage.holds(state(21))
    assert lineage.holds(state(30, SECOND))
    assert not lineage.holds(state(31, SECOND))
    assert lineage.holds(state(1000, THIRD))
    assert not lineage.grown(Term(2, 2), state(15)).holds(state(25, SECOND))
    assert not lineage.grown(Term(2, 2), None).holds(state(5))


@pytest.mark.parametrize(
    "domains",
    ["ab", "abc", "aabb", "abab", "aabbc", "abcabc", "aaabbcd", "abcd"],
)
def test_one_buddy_each_in_another_domain(domains: str) -> None:
    """As long as no domain has more than half of the slots."""
    slots = members(*domains)
    chosen = buddies(slots)
    domain = {info.address: info.domain for info in slots}
    assert set(Counter(chosen).values()) == {1}
    assert all(domain[buddy] != info.domain for buddy, info in zip(chosen, slots, strict=True))


@pytest.mark.parametrize("domains", ["aab", "aaab", "abbbb", "aaaabc"])
def test_another_domain_matters_more_than_an_even_share(domains: str) -> None:
    """What is shared is spread."""
    slots = members(*domains)
    chosen = buddies(slots)
    domain = {info.address: info.domain for info in slots}
    assert all(domain[buddy] != info.domain for buddy, info in zip(chosen, slots, strict=True))
    alone = Counter(domains).most_common(1)[0][1]
    assert max(Counter(chosen).values()) <= -(-alone // (len(domains) - alone)) + 1


def test_buddies_without_another_domain_or_pod() -> None:
    """Another pod is better than nothing; unknown domains count as different ones."""
    assert buddies(members("a", "a", "a")) == ("pod-1:1", "pod-2:1", "pod-0:1")
    assert buddies(members("a")) == ("",)
    assert set(buddies(members("", "", ""))) == {"pod-0:1", "pod-1:1", "pod-2:1"}
