"""A snapshot that its slot loses before its buddy has it: a bit has flipped, or it was overwritten while the agent was
away. Others wait for it, the job's end at the last step: each GPU would stand idle for a minute."""

from __future__ import annotations

import pytest

from lockstep_api.messages import (
    Abandon,
    Copies,
    Inventory,
    Join,
    Kept,
    Membership,
    Origin,
    Quiesced,
    RestorePoint,
    SlotInfo,
    Staged,
    StateId,
    Steps,
    StepSummary,
    Term,
    ToLeader,
    ToMember,
    Void,
    WorkerExited,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, SendMember
from lockstep_trainer.protocol.events import StateStaged
from lockstep_trainer.protocol.holdings import Holdings, HoldingsMemory
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.snapshots import KEEP_SECONDS, Snapshots

JOB = "job"
TERM = Term(1, 1)
LAST = 100


def at(step: int) -> StateId:
    return StateId(step, 1, 1)


def said(step: int, slot: int = 0, *, copied: bool = False, gone: bool = False) -> Staged:
    return Staged(JOB, TERM, slot, at(step), copied, gone=gone)


def staging(*steps: int) -> Holdings:
    """A member whose workers have staged those states, and whose buddy has none."""
    holdings = Holdings(HoldingsMemory(origin=Origin(TERM, 0), buddy="10.0.0.2:1"))
    for step in steps:
        holdings.staged(StateStaged(TERM, at(step)))
    return holdings


def words(holdings: Holdings) -> list[ToLeader]:
    return holdings.says(JOB, TERM, 0, 0.0)


def test_a_member_says_that_it_has_lost_a_snapshot() -> None:
    """Until that is answered, and so does its next agent."""
    holdings = staging(10)
    holdings.held((Copies(at(10), 0, 0),), 0)
    assert words(holdings) == [said(10)]
    assert holdings.held((), 0)
    assert words(holdings) == [said(10, gone=True)]
    assert words(Holdings(holdings.memory)) == [said(10, gone=True)]
    holdings.kept_by_all(Kept(JOB, TERM, at(10)))
    assert words(holdings) == []


def test_a_newer_snapshot_says_it_as_well() -> None:
    holdings = staging(10)
    holdings.held((), 0)
    holdings.staged(StateStaged(TERM, at(20)))
    assert words(holdings) == [said(20)]
    assert holdings.memory.gone is None


def test_of_two_lost_ones_the_newer_is_said() -> None:
    holdings = staging(10, 20)
    holdings.held((), 0)
    assert words(holdings) == [said(20, gone=True)]


def test_what_a_slot_has_lost_is_not_kept_and_others_go_on() -> None:
    snapshots = Snapshots(slots=2)
    assert snapshots.add(said(10, 0, copied=True), 0.0) == set()
    assert snapshots.add(said(10, 1, gone=True), 1.0) == {0, 1}
    snapshots.add(said(10, 1), 2.0)  # an older word of it
    assert snapshots.void(at(10))
    assert snapshots.next(lambda: {1: "its buddy is away"}) is None
    assert snapshots.stuck(KEEP_SECONDS + 1.0).endswith("step 10 waits: slot 1 has lost it")
    for slot in (0, 1):
        snapshots.add(said(20, slot, copied=True), 3.0)
    assert snapshots.next(dict) == at(20)


def test_each_slot_is_told_once_that_it_waits_in_vain() -> None:
    """Of a thousand, half are at a state that the others have passed by: no word of theirs is for all of them again."""
    snapshots = Snapshots(slots=1000)
    told = [snapshots.add(said(10, slot), 0.0) for slot in range(500)]
    told += [snapshots.add(said(20, slot), 1.0) for slot in range(500, 1000)]
    assert [slots for slots in told if slots] == [set(range(500))]
    assert snapshots.add(said(10, 7), 2.0) == {7}, "it has not heard of it"


def leading() -> Leader:
    """Two members, whose generation has made the last step, and whose workers have ended well."""
    plan = JobPlan(JOB, 2, 1, steps=LAST, checkpoint_every=10)
    slots = tuple(SlotInfo(slot, f"pod-{slot}", f"uid-{slot}", "boot", f"10.0.0.{slot}:1") for slot in (0, 1))
    leader = Leader(plan, Membership(JOB, 1, slots), None, 0.0)
    leader.begin(0.0)
    for slot in (0, 1):
        here = Inventory(JOB, f"pod-{slot}", f"uid-{slot}", "boot", Term(1, 0), 1, slot, None, 0, None, 1, 1)
        leader.handle(events.MemberConnected(slot, Join(JOB, 1, slot, here)), 0.0)
        leader.handle(events.MemberSaid(slot, Quiesced(JOB, leader.abandoned, slot)), 0.0)
    leader.handle(events.RestoreChosen(leader.abandoned, RestorePoint(StateId(90, 1, 0), "step-90", "00")), 0.0)
    leader.handle(events.StoreReady("10.0.0.1", 1), 0.0)
    assert leader.running is not None
    done = StepSummary(LAST, 1.9, 0.1, 2.0, 256, 1.0, 1e-3)
    for slot in (0, 1):
        leader.handle(events.MemberSaid(slot, Steps(JOB, leader.term, slot, (done,), "forward")), 2.0)
        leader.handle(events.MemberSaid(slot, WorkerExited(JOB, leader.term, slot, slot, 0)), 2.0)
    assert leader.finishing
    return leader


def told(effects: list[Effect]) -> list[ToMember]:
    return [one.message for one in effects if isinstance(one, SendMember)]


@pytest.mark.parametrize(("step", "ends"), [(LAST, True), (LAST - 10, False)], ids=["the-last", "an-older-one"])
def test_the_last_state_is_computed_again_at_once(step: int, ends: bool) -> None:
    """An older one is not what the end waits for: the last may be staged, and not be told yet."""
    leader = leading()
    leader.handle(events.MemberSaid(0, said(step, 0, copied=True)), 2.1)
    assert Void(JOB, TERM, at(step)) in told(leader.handle(events.MemberSaid(1, said(step, 1, gone=True)), 2.2))
    ended = [one.cause for one in told(leader.handle(events.Tick(), 2.3)) if isinstance(one, Abandon)]
    assert ended == (["FinalCheckpointMissing, slot None"] * 2 if ends else [])
