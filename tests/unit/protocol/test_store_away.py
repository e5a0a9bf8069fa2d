"""A member is lost while the store is away: the new epoch trains on from memory, and ties itself to the chain later."""

from __future__ import annotations

import pytest

from lockstep_api.messages import (
    Abandon,
    Beat,
    Committed,
    Copies,
    Descent,
    Inventory,
    Join,
    Membership,
    Origin,
    Quiesced,
    RestorePoint,
    SlotInfo,
    StateId,
    Term,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.durability import PATIENCE_SECONDS
from lockstep_trainer.protocol.effects import ChooseRestore, Effect, SendMember
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader

JOB = "job"
DURABLE = RestorePoint(StateId(12, 1, 1), "step-12-e1-g1/manifest.json", "sha")
BEHIND = RestorePoint(StateId(20, 1, 1), "step-20-e1-g1/manifest.json", "sha")
"""What the lost leader has committed last, and told nobody of."""
HELD = StateId(18, 1, 1)
TOLD = Descent(Term(1, 1), DURABLE)


def forming(told: Descent | None = TOLD, held: StateId = HELD, origin: Origin | None = None, epoch: int = 2) -> Leader:
    """A leader of a new epoch whose only member holds a state in memory. The store was asked at 0 s."""
    slot = SlotInfo(0, "pod", "uid", "boot", "10.0.0.1:1")
    leader = Leader(JobPlan(JOB, 1, 1, steps=100, memory_buddy=False), Membership(JOB, epoch, (slot,)), None, 0.0)
    leader.begin(0.0)
    here = Inventory(JOB, "pod", "uid", "boot", Term(epoch, 0), epoch, 0, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join(JOB, epoch, 0, here, descent=told)), 0.0)
    quiesced = Quiesced(JOB, leader.abandoned, 0, origin or Origin(Term(1, 1), 12), (Copies(held, 0, 12),))
    leader.handle(events.MemberSaid(1, quiesced), 0.0)
    leader.handle(events.StoreReady("10.0.0.1", 1), 0.0)
    return leader


def wait(leader: Leader, until: float, since: float = 0.0) -> list[Effect]:
    """The member is heard of, the store is not."""
    effects: list[Effect] = []
    for tenth in range(int(since * 10) + 1, int(until * 10) + 1):
        effects += leader.handle(events.MemberSaid(1, Beat(JOB, leader.term, 0)), tenth / 10)
        effects += leader.handle(events.Tick(), tenth / 10)
    return effects


def asked(effects: list[Effect]) -> list[ChooseRestore]:
    return [effect for effect in effects if isinstance(effect, ChooseRestore)]


def told(effects: list[Effect], kind: type) -> list[object]:
    return [one.message for one in effects if isinstance(one, SendMember) and isinstance(one.message, kind)]


def away() -> Leader:
    leader = forming()
    wait(leader, PATIENCE_SECONDS)
    assert leader.running is not None
    return leader


def test_a_store_that_answers_in_time_is_waited_for() -> None:
    leader = forming()
    wait(leader, PATIENCE_SECONDS - 0.5)
    assert leader.running is None
    leader.handle(events.RestoreChosen(leader.abandoned, BEHIND), PATIENCE_SECONDS)
    assert leader.running is not None
    assert (leader.running.restore, leader.running.memory, leader.running.loose) == (BEHIND, None, False)


def test_what_the_members_know_stands_for_what_the_chain_names() -> None:
    leader = forming()
    done = wait(leader, PATIENCE_SECONDS)
    assert leader.running is not None
    assert leader.running.memory is not None
    assert (leader.running.restore, leader.running.memory.state, leader.running.loose) == (DURABLE, HELD, True)
    assert asked(done) == [ChooseRestore(Term(2, 0), None, DURABLE)], "when the store is back, it goes to that"


@pytest.mark.parametrize("nothing", [None, Descent(Term(1, 1), None)], ids=["an older agent", "nothing durable yet"])
def test_without_their_word_the_store_is_waited_for(nothing: Descent | None) -> None:
    leader = forming(nothing)
    wait(leader, 60.0)
    assert leader.running is None


def test_when_it_is_back_the_generation_is_tied_to_the_chain() -> None:
    leader = away()
    effects = leader.handle(events.RestoreChosen(Term(2, 0), DURABLE), 30.0)
    assert told(effects, Committed) == [Committed(JOB, leader.term, DURABLE)], "members need not know of it any more"
    assert leader.running is not None
    assert leader.durability.known


def test_where_the_chain_does_not_lead_to_its_ancestor_it_begins_again() -> None:
    """With one checkpoint kept, the lost leader's last one has replaced what the members know."""
    leader = away()
    effects = leader.handle(events.RestoreChosen(Term(2, 0), BEHIND), 30.0)
    assert told(effects, Abandon)
    assert leader.running is None


def test_the_next_leader_sends_the_chain_back_for_what_was_made_meanwhile() -> None:
    """The store is back, and nobody has tied the last epoch to it."""
    loose, origin = Descent(Term(2, 1), DURABLE, loose=True), Origin(Term(2, 1), 18)
    leader = forming(loose, StateId(40, 2, 1), origin, epoch=3)
    leader.handle(events.RestoreChosen(leader.abandoned, BEHIND), 0.5)
    assert leader.running is None
    assert asked(wait(leader, 1.0, since=0.5)) == [ChooseRestore(leader.abandoned, None, DURABLE)]
    leader.handle(events.RestoreChosen(leader.abandoned, DURABLE), 1.5)
    assert leader.running is not None
    assert leader.running.memory is not None
    assert (leader.running.restore, leader.running.memory.state) == (DURABLE, StateId(40, 2, 1))


def test_it_begins_from_the_chain_where_that_has_more() -> None:
    loose, origin = Descent(Term(2, 1), DURABLE, loose=True), Origin(Term(2, 1), 18)
    leader = forming(loose, StateId(19, 2, 1), origin, epoch=3)
    leader.handle(events.RestoreChosen(leader.abandoned, BEHIND), 0.5)
    assert leader.running is not None
    assert (leader.running.restore, leader.running.memory) == (BEHIND, None)


def test_a_chain_that_can_not_go_back_is_asked_once() -> None:
    loose, origin = Descent(Term(2, 1), DURABLE, loose=True), Origin(Term(2, 1), 18)
    leader = forming(loose, StateId(40, 2, 1), origin, epoch=3)
    leader.handle(events.RestoreChosen(leader.abandoned, BEHIND), 0.5)
    wait(leader, 1.0, since=0.5)
    leader.handle(events.RestoreChosen(leader.abandoned, BEHIND), 1.5)
    assert leader.running is not None
    assert (leader.running.restore, leader.running.memory) == (BEHIND, None)
