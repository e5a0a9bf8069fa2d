"""Workers that could not begin from the snapshot they were told to, while the chain has moved on (the simulation found
that they trained on, and that nothing they made could ever be committed)."""

from __future__ import annotations

from lockstep_api.messages import (
    Abandon,
    Beat,
    Copies,
    Inventory,
    Join,
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
    Uploaded,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Commit, Effect, SendMember
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader

JOB = "job"
STATE = StateId(6, 1, 1)
POINT = RestorePoint(STATE, "step-6-e1-g1/manifest.json", "sha")


def from_memory() -> Leader:
    """A second generation is told to begin from a snapshot; nothing is durable yet, and the snapshot is on its way."""
    slot = SlotInfo(0, "pod", "uid", "boot", "10.0.0.1:1")
    leader = Leader(JobPlan(JOB, 1, 1, steps=100, memory_buddy=False), Membership(JOB, 1, (slot,)), None, 0.0)
    leader.begin(0.0)
    here = Inventory(JOB, "pod", "uid", "boot", Term(1, 0), 1, 0, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join(JOB, 1, 0, here)), 0.0)
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), 0.0)
    leader.handle(events.RestoreChosen(leader.abandoned, None), 0.0)
    leader.handle(events.StoreReady("10.0.0.1", 1), 0.0)
    leader.handle(events.MemberSaid(1, Staged(JOB, leader.term, 0, STATE, True)), 1.0)
    assert leader.keeping.uploads.order is not None
    leader.handle(events.StoreLost("killed"), 2.0)
    copies = (Copies(STATE, 0, 0),)
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0, Origin(Term(1, 1), 0), copies)), 3.0)
    leader.handle(events.StoreReady("10.0.0.1", 2), 3.0)
    assert leader.running is not None
    assert leader.running.memory is not None
    assert (leader.running.memory.state, leader.running.restore) == (STATE, None)
    return leader


def uploads(leader: Leader) -> list[Effect]:
    return leader.handle(events.MemberSaid(1, Uploaded(JOB, leader.term, 0, STATE, (), "{}")), 4.0)


def restores_fresh_weights(leader: Leader, now: float) -> list[Effect]:
    return leader.handle(events.WorkerReported({"kind": "restore", "source": "store", "manifest": None}), now)


def abandons(effects: list[Effect]) -> bool:
    return any(isinstance(effect, SendMember) and isinstance(effect.message, Abandon) for effect in effects)


def goes_on(leader: Leader, now: float) -> None:
    """Its workers are reaped; what it has in memory is told again."""
    copies = (Copies(STATE, 0, 0),)
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0, Origin(Term(1, 2), 6), copies)), now)
    leader.handle(events.StoreReady("10.0.0.1", 3), now)


def test_what_began_before_the_commit_begins_again_behind_it() -> None:
    leader = from_memory()
    assert any(isinstance(effect, Commit) for effect in uploads(leader))
    leader.handle(events.CommitDone(leader.term, POINT), 5.0)
    assert abandons(restores_fresh_weights(leader, 6.0))
    goes_on(leader, 7.0)
    assert leader.running is not None
    assert (leader.running.term, leader.running.memory, leader.running.restore) == (Term(1, 3), None, POINT)


def test_a_first_step_says_it_too_and_counts_for_nothing() -> None:
    leader = from_memory()
    uploads(leader)
    leader.handle(events.CommitDone(leader.term, POINT), 5.0)
    done = StepSummary(1, 6.0, 0.1, 2.0, 256, 1.0, 1e-3)
    assert abandons(leader.handle(events.MemberSaid(1, Steps(JOB, leader.term, 0, (done,), "forward")), 6.0))
    assert leader.reports.newest is None


def test_what_they_stage_until_they_have_left_is_on_no_lineage() -> None:
    """The simulation found it on the chain, behind a state that it did not descend from: workers were slow to go."""
    leader = from_memory()
    uploads(leader)
    leader.handle(events.CommitDone(leader.term, POINT), 5.0)
    stale = leader.term
    assert abandons(restores_fresh_weights(leader, 6.0))
    later = StateId(8, stale.epoch, stale.generation)
    told = leader.handle(events.MemberSaid(1, Staged(JOB, stale, 0, later, True)), 6.5)
    assert not [effect for effect in told if isinstance(effect, SendMember)], "neither kept nor brought to the store"
    copies = (Copies(STATE, 0, 0), Copies(later, 0, 0))
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0, Origin(stale, 0), copies)), 7.0)
    leader.handle(events.StoreReady("10.0.0.1", 3), 7.0)
    assert leader.running is not None
    assert (leader.running.memory, leader.running.restore) == (None, POINT)


def test_a_commit_without_an_answer_that_was_passed_over_is_asked_for_first() -> None:
    """Memory alone is no beginning where the chain may name what its workers did not begin from."""
    leader = from_memory()
    uploads(leader)
    leader.handle(events.CommitFailed(leader.term, STATE, "no answer"), 5.0)
    stale = leader.term
    restores_fresh_weights(leader, 5.5)
    copies = (Copies(StateId(8, stale.epoch, stale.generation), 0, 0),)
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0, Origin(stale, 0), copies)), 6.0)
    leader.handle(events.StoreReady("10.0.0.1", 3), 6.0)
    for second in range(7, 100):
        leader.handle(events.MemberSaid(1, Beat(JOB, leader.term, 0)), float(second))
        leader.handle(events.Tick(), float(second))
    assert leader.durability.silent(100.0), "the chain does not answer"
    assert leader.running is None
    leader.handle(events.RestoreChosen(leader.abandoned, POINT), 100.0)
    assert leader.running is not None
    assert (leader.running.memory, leader.running.restore) == (None, POINT)


def test_a_commit_without_an_answer_may_have_moved_the_chain() -> None:
    leader = from_memory()
    uploads(leader)
    leader.handle(events.CommitFailed(leader.term, STATE, "no answer"), 5.0)
    assert abandons(restores_fresh_weights(leader, 5.5))
    goes_on(leader, 6.0)
    assert leader.running is None, "the chain is asked first"
    leader.handle(events.RestoreChosen(leader.abandoned, POINT), 7.0)
    assert leader.running is not None
    assert leader.running.restore == POINT


def test_where_the_chain_stands_still_they_train_on() -> None:
    leader = from_memory()
    assert not abandons(restores_fresh_weights(leader, 4.0))
    assert leader.running is not None
    assert leader.keeping.uploads.order is None, "what they do not descend from is not brought to the store"
