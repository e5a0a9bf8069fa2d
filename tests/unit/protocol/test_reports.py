"""What the leader tells the operator of checkpoints and recoveries."""

from __future__ import annotations

import pytest

from lockstep_api.messages import (
    Inventory,
    Join,
    Membership,
    Progress,
    Quiesced,
    Recovered,
    RestorePoint,
    SlotInfo,
    StateId,
    Steps,
    StepSummary,
    Term,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.durability import Pending
from lockstep_trainer.protocol.effects import Effect, SendOperator
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader

STATE = StateId(20, 1, 1)
POINT = RestorePoint(STATE, "step-20-e1-g1/manifest.json", "00")
CHECKS = ("loss and gradient norm are finite",)


def progress(effects: list[Effect]) -> Progress:
    (found,) = [
        each.message for each in effects if isinstance(each, SendOperator) and isinstance(each.message, Progress)
    ]
    return found


def test_the_checks_of_a_commit_are_told_until_another_state_is_the_durable_one() -> None:
    slot = SlotInfo(0, "pod", "uid-0", "boot", "127.0.0.1:1")
    leader = Leader(JobPlan("uid", nodes=1, gpus_per_node=1), Membership("uid", 1, (slot,)), None, 0.0)
    leader.durability.choose(Term(1, 1), 0.0)
    leader.durability.chosen(events.RestoreChosen(Term(1, 1), None), 0.0)
    leader.durability.ready(Pending(STATE, None, "{}", ()), Term(1, 1), 1.0)
    assert progress(leader.handle(events.OperatorConnected(), 1.0)).durable_verified == ()
    uri = f"file:///a/{POINT.manifest}"
    leader.handle(events.CommitDone(leader.term, POINT, uri, verified=CHECKS), 2.0)
    told = progress(leader.handle(events.Tick(), 3.0))
    assert (told.durable, told.durable_uri, told.durable_verified) == (POINT, uri, CHECKS)
    parent = RestorePoint(StateId(10, 1, 1), "step-10-e1-g1/manifest.json", "00")
    leader.durability.found(parent, 4.0)  # the workers found the newer one corrupt
    leader.reports.dirty = True
    told = progress(leader.handle(events.Tick(), 5.0))
    assert (told.durable, told.durable_uri, told.durable_verified) == (parent, f"file:///a/{parent.manifest}", ())


def test_a_new_leader_says_which_checkpoint_is_durable() -> None:
    """One that the leader before it has committed and could not report any more."""
    slot = SlotInfo(0, "pod", "uid-0", "boot", "127.0.0.1:1")
    leader = Leader(JobPlan("uid", nodes=1, gpus_per_node=1), Membership("uid", 1, (slot,)), None, 0.0)
    leader.durability.choose(Term(1, 1), 0.0)
    leader.handle(events.RestoreChosen(Term(1, 1), POINT, "file:///a", 0.5, CHECKS), 1.0)
    told = progress(leader.handle(events.OperatorConnected(), 2.0))
    assert (told.durable, told.durable_uri, told.durable_at) == (POINT, "file:///a", 0.5)
    assert told.durable_verified == CHECKS


def test_a_new_leader_tells_what_the_loss_of_the_old_one_cost() -> None:
    """It has no memory of the fault: its members know how far the job was."""
    slot = SlotInfo(0, "pod", "uid", "boot", "10.0.0.1:1")
    leader = Leader(JobPlan("job", 1, 1, steps=100), Membership("job", 2, (slot,)), None, 10.0)
    leader.begin(10.0)
    leader.handle(events.OperatorConnected(), 10.0)
    here = Inventory("job", "pod", "uid", "boot", Term(1, 3), 2, 0, None, 47, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join("job", 2, 0, here)), 10.5)
    leader.handle(events.MemberSaid(1, Quiesced("job", leader.abandoned, 0)), 10.5)
    started = StateId(40, 1, 3)
    point = RestorePoint(started, "step-40-e1-g3/manifest.json", "00")
    leader.handle(events.RestoreChosen(leader.abandoned, point), 11.0)
    leader.handle(events.StoreReady("10.0.0.1", 1), 11.0)
    assert leader.running is not None
    told = leader.handle(
        events.WorkerReported({"kind": "restore", "source": "store", "manifest": point.manifest}), 11.5
    )
    for step in range(41, 49):
        done = StepSummary(step, 12.0 + step / 10, 0.1, 2.0, 256, 1.0, 1e-3)
        told += leader.handle(events.MemberSaid(1, Steps("job", leader.term, 0, (done,), "forward")), 13.0)
    (recovered,) = [e.message for e in told if isinstance(e, SendOperator) and isinstance(e.message, Recovered)]
    assert (recovered.steps_lost, recovered.source) == (7, "store")
    assert sum(recovered.seconds.values()) == pytest.approx(6.8)  # until step 48, from the epoch's begin
