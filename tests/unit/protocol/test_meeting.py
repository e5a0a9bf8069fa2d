"""A worker hangs while its generation meets: found soon once all are there, and never while somebody is to come yet."""

from __future__ import annotations

from lockstep_api.messages import (
    Beat,
    Examine,
    Examined,
    Inventory,
    Join,
    Membership,
    Position,
    Quiesced,
    SlotInfo,
    Steps,
    Term,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import SendMember
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.progress import HangBounds

JOB = "job"
BOUND = 100.0
SLOTS = tuple(SlotInfo(slot, f"pod-{slot}", f"uid-{slot}", "boot", f"10.0.0.{slot}:1") for slot in range(2))


def started() -> Leader:
    """A leader of two members whose generation has just begun."""
    plan = JobPlan(JOB, 2, 1, steps=100, hang=HangBounds(minimum_seconds=10.0, meeting_seconds=BOUND))
    leader = Leader(plan, Membership(JOB, 1, SLOTS), None, 0.0)
    leader.begin(0.0)
    for slot in range(2):
        here = Inventory(JOB, f"pod-{slot}", f"uid-{slot}", "boot", Term(1, 0), None, slot, None, 0, None, 1, 1)
        leader.handle(events.MemberConnected(slot, Join(JOB, 1, slot, here)), 0.0)
        leader.handle(events.MemberSaid(slot, Quiesced(JOB, leader.abandoned, slot)), 0.0)
    leader.handle(events.StoreReady("10.0.0.0", 1), 0.0)
    leader.handle(events.RestoreChosen(leader.abandoned, None), 0.0)
    assert leader.running is not None
    return leader


def is_in(leader: Leader, slot: int, section: str, now: float) -> None:
    assert leader.running is not None
    leader.handle(events.MemberSaid(slot, Steps(JOB, leader.running.term, slot, (), section)), now)


def asks(leader: Leader, now: float) -> bool:
    """Whether the leader asks its members where their workers are. Both are heard of."""
    for slot in range(2):
        leader.handle(events.MemberSaid(slot, Beat(JOB, leader.term, slot)), now)
    effects = leader.handle(events.Tick(), now)
    return any(isinstance(effect, SendMember) and isinstance(effect.message, Examine) for effect in effects)


def test_who_does_not_meet_is_asked_for_and_named_from_when_the_last_one_came() -> None:
    leader = started()
    is_in(leader, 0, "rendezvous", 1.0)
    is_in(leader, 1, "data", 1.0)
    assert not asks(leader, 900.0), "rank 1 still prepares its data"
    is_in(leader, 1, "rendezvous", 1000.0)
    assert not asks(leader, 1000.0 + BOUND - 1)
    assert asks(leader, 1000.0 + BOUND + 1)
    waits = Position(0, 0, "rendezvous", "S", answered=True, communicating=True)
    stopped = Position(1, 0, "rendezvous", "T", answered=False)
    for position in (waits, stopped):
        leader.handle(events.MemberSaid(position.rank, Examined(JOB, leader.term, position.rank, (position,))), 1102.0)
    asks(leader, 1102.0)
    assert leader.running is None
    (suspect,) = leader.verdicts.suspects
    assert (suspect.cause, suspect.rank) == ("Hang", 1)


def test_behind_the_meeting_the_bound_for_the_first_step_counts() -> None:
    leader = started()
    for slot in range(2):
        is_in(leader, slot, "rendezvous", 1.0)
    is_in(leader, 0, "build", 50.0)
    assert not asks(leader, 50.0 + BOUND - 1), "somebody has gone on"
    is_in(leader, 1, "build", 140.0)
    assert not asks(leader, 1799.0)
    assert asks(leader, 1801.0)
