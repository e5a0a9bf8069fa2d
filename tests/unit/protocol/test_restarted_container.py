"""A container that is started again in place: the fault is its own, whoever was heard first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep_api.messages import Inventory, Join, Membership, Quiesced, SlotInfo, Term, WorkerExited
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.policy import PEER_LOST_EXIT

JOB = "job"
SLOTS = tuple(SlotInfo(slot, f"pod-{slot}", f"uid-{slot}", "boot", f"10.0.0.{slot}:1") for slot in (0, 1))


def here(slot: int) -> Inventory:
    return Inventory(JOB, f"pod-{slot}", f"uid-{slot}", "boot", Term(1, 0), None, slot, None, 0, None, 1, 1)


def leading() -> Leader:
    """A leader of two members, whose first generation runs."""
    plan = JobPlan(JOB, 2, 1, steps=100, checkpoint_every=10, memory_buddy=False)
    leader = Leader(plan, Membership(JOB, 1, SLOTS), None, 0.0)
    leader.begin(0.0)
    for slot in (0, 1):
        leader.handle(events.MemberConnected(slot, Join(JOB, 1, slot, here(slot))), 0.0)
    leader.handle(events.RestoreChosen(leader.abandoned, None), 0.0)
    for slot in (0, 1):
        leader.handle(events.MemberSaid(slot, Quiesced(JOB, leader.abandoned, slot)), 0.0)
    leader.handle(events.StoreReady("10.0.0.1", 1), 0.0)
    assert leader.running is not None
    return leader


def judged(leader: Leader) -> tuple[str, str, int | None]:
    """Cause, rung and slot of the newest fault."""
    fault = leader.verdicts.history[-1]
    return fault.cause, fault.answer, fault.slot


@pytest.mark.parametrize("exit_code", [PEER_LOST_EXIT, 1])
def test_a_peer_that_was_heard_first_is_not_the_root(exit_code: int) -> None:
    """The other container's worker lost its peer, and said so before the new container's agent was there."""
    leader = leading()
    leader.handle(events.MemberClosed(1), 1.0)
    leader.handle(events.MemberSaid(0, WorkerExited(JOB, leader.term, 0, 0, exit_code, at=1.1)), 1.2)
    back = replace(here(1), term=Term(1, 1), container_starts=2)
    leader.handle(events.MemberConnected(2, Join(JOB, 1, 1, back)), 4.0)
    for connection, slot in ((0, 0), (2, 1)):
        leader.handle(events.MemberSaid(connection, Quiesced(JOB, leader.abandoned, slot)), 4.1)
    assert judged(leader) == ("ContainerRestarted", "container", 1)


def test_a_stream_that_was_cut_is_no_restart() -> None:
    """The same member comes back in the same container: what its peer said stays."""
    leader = leading()
    leader.handle(events.MemberClosed(1), 1.0)
    leader.handle(events.MemberSaid(0, WorkerExited(JOB, leader.term, 0, 0, -9, at=1.1)), 1.2)
    leader.handle(events.MemberConnected(2, Join(JOB, 1, 1, replace(here(1), term=Term(1, 1)))), 4.0)
    for connection, slot in ((0, 0), (2, 1)):
        leader.handle(events.MemberSaid(connection, Quiesced(JOB, leader.abandoned, slot)), 4.1)
    assert judged(leader) == ("WorkerExited", "process", 0)
