"""What the leader says is wrong with checkpoints, and for how long."""

from __future__ import annotations

from lockstep_api.messages import (
    Inventory,
    Join,
    Membership,
    Progress,
    Quiesced,
    SlotInfo,
    Staged,
    StateId,
    Steps,
    StepSummary,
    Term,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import SendOperator
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.snapshots import Snapshots

JOB = "job"
DAMAGED = "step-20-e1-g1/__0_0.distcp: its checksum differs"


def begun(leader: Leader, now: float) -> Leader:
    """A generation of one member starts from the store."""
    leader.begin(now)
    here = Inventory(JOB, "pod", "uid", "boot", Term(1, 0), 1, 0, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join(JOB, 1, 0, here)), now)
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), now)
    leader.handle(events.RestoreChosen(leader.abandoned, None), now)
    leader.handle(events.StoreReady("10.0.0.1", 1), now)
    assert leader.running is not None
    return leader


def new_leader(now: float = 0.0) -> Leader:
    slot = SlotInfo(0, "pod", "uid", "boot", "10.0.0.1:1")
    return begun(Leader(JobPlan(JOB, 1, 1, steps=100), Membership(JOB, 1, (slot,)), None, now), now)


def reports(leader: Leader, message: str, now: float) -> None:
    leader.handle(events.WorkerReported({"kind": "checkpoint_problem", "step": 20, "message": message}), now)


def steps(leader: Leader, step: int, now: float) -> None:
    done = StepSummary(step, now, 0.1, 2.0, 256, 1.0, 1e-3)
    leader.handle(events.MemberSaid(1, Steps(JOB, leader.term, 0, (done,), "forward")), now)


def test_what_a_restore_met_is_over_once_training_goes_on() -> None:
    """Not only at the next commit, which may be hours away."""
    leader = new_leader()
    assert leader.keeping.problem(leader) is None
    reports(leader, DAMAGED, 1.0)
    assert leader.keeping.problem(leader) == DAMAGED
    steps(leader, 1, 2.0)
    assert leader.keeping.problem(leader) is None


def test_what_a_restore_met_is_over_with_its_generation() -> None:
    leader = new_leader()
    reports(leader, DAMAGED, 1.0)
    leader.handle(events.StoreLost("killed"), 2.0)
    assert leader.keeping.problem(leader) == DAMAGED
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), 3.0)
    leader.handle(events.StoreReady("10.0.0.1", 2), 3.0)
    assert leader.running is not None
    assert leader.keeping.problem(leader) is None


def test_steps_do_not_hide_that_the_store_is_away() -> None:
    leader = new_leader()
    leader.durability.failed("the store does not answer", superseded=False, now=1.0)
    steps(leader, 1, 2.0)
    assert leader.keeping.problem(leader) == "the store does not answer"


def test_a_state_that_nobody_keeps_is_told() -> None:
    """Once a member gave a copy up without a word, and a job stood at its last step with nothing to be seen."""
    snapshots = Snapshots(slots=2)
    state = StateId(20, 1, 1)
    snapshots.add(Staged(JOB, Term(1, 1), 0, state, copied=True), 10.0)
    snapshots.add(Staged(JOB, Term(1, 1), 1, state, copied=False), 11.0)
    assert snapshots.stuck(100.0) == ""
    assert snapshots.stuck(135.0) == (
        "no state was kept in memory for over 120 s; step 20 waits: slot 1 has not brought its copy to its buddy"
    )
    snapshots.add(Staged(JOB, Term(1, 1), 1, state, copied=True), 136.0)
    assert snapshots.next(dict) == state
    assert snapshots.stuck(500.0) == ""


def test_what_other_data_training_began_on_is_told_to_the_operator() -> None:
    leader = new_leader()
    line = {"kind": "data_changed", "step": 20, "manifest": "m", "message": "the seed was 0, and is 1 now"}
    leader.handle(events.WorkerReported(line), 1.0)
    effects = leader.handle(events.OperatorConnected(), 2.0)
    said = [each.message for each in effects if isinstance(each, SendOperator)]
    (progress,) = (each for each in said if isinstance(each, Progress))
    assert progress.other_data == "up to step 20: the seed was 0, and is 1 now"
