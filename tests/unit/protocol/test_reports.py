"""What the leader tells the operator of its checkpoints."""

from __future__ import annotations

from lockstep_api.messages import Membership, Progress, RestorePoint, SlotInfo, StateId, Term
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
    leader.handle(events.CommitDone(POINT, "file:///a", verified=CHECKS), 2.0)
    told = progress(leader.handle(events.Tick(), 3.0))
    assert (told.durable, told.durable_uri, told.durable_verified) == (POINT, "file:///a", CHECKS)
    leader.durability.found(None, 4.0)  # the workers found it corrupt
    leader.reports.dirty = True
    assert progress(leader.handle(events.Tick(), 5.0)).durable_verified == ()


def test_a_new_leader_says_which_checkpoint_is_durable() -> None:
    """One that the leader before it has committed and could not report any more."""
    slot = SlotInfo(0, "pod", "uid-0", "boot", "127.0.0.1:1")
    leader = Leader(JobPlan("uid", nodes=1, gpus_per_node=1), Membership("uid", 1, (slot,)), None, 0.0)
    leader.durability.choose(Term(1, 1), 0.0)
    leader.handle(events.RestoreChosen(Term(1, 1), POINT, "file:///a", 0.5, CHECKS), 1.0)
    told = progress(leader.handle(events.OperatorConnected(), 2.0))
    assert (told.durable, told.durable_uri, told.durable_at) == (POINT, "file:///a", 0.5)
    assert told.durable_verified == CHECKS
