"""Rules that other rules nearly always make up for: random schedules do not get to what they are for, so each is tried
alone. ``simulation.mutations`` changes them one by one and runs these tests."""

from __future__ import annotations

from lockstep_api.messages import (
    Abandon,
    Copies,
    Inventory,
    Invite,
    Join,
    Membership,
    Origin,
    Quiesced,
    Rendezvous,
    RestorePoint,
    SlotInfo,
    Staged,
    Start,
    StateId,
    Steps,
    StepSummary,
    Stop,
    Term,
    Upload,
    Uploaded,
    UploadProblem,
    WorkerExited,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.durability import Durability, Pending
from lockstep_trainer.protocol.effects import ChooseRestore, Commit, Effect, Launch, SendMember, UploadState
from lockstep_trainer.protocol.holdings import Holdings, HoldingsMemory, UploadOrder
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.lineage import Lineage
from lockstep_trainer.protocol.member import Identity, Member, MemberMemory

JOB = "job"
SLOT = SlotInfo(0, "pod", "uid", "boot", "10.0.0.1:1")


def leading(generations: int = 1) -> Leader:
    """A leader of one member, whose newest generation of that many runs."""
    plan = JobPlan(JOB, 1, 1, steps=100, checkpoint_every=10, memory_buddy=False)
    leader = Leader(plan, Membership(JOB, 1, (SLOT,)), None, 0.0)
    leader.begin(0.0)
    here = Inventory(JOB, "pod", "uid", "boot", Term(1, 0), 1, 0, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join(JOB, 1, 0, here)), 0.0)
    leader.handle(events.RestoreChosen(leader.abandoned, None), 0.0)
    for generation in range(1, generations + 1):
        leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), float(generation))
        leader.handle(events.StoreReady("10.0.0.1", generation), float(generation))
        assert leader.running is not None
        assert leader.term == Term(1, generation)
        if generation < generations:
            leader.handle(events.StoreLost("killed"), generation + 0.5)
    return leader


def test_the_end_of_an_older_generation_s_worker_is_no_fault_of_this_one() -> None:
    """Said again by a member whose stream was cut between its workers' end and the new start."""
    leader = leading(generations=2)
    leader.handle(events.MemberSaid(1, WorkerExited(JOB, Term(1, 1), 0, 0, -9)), 3.0)
    assert leader.running is not None
    assert leader.running.term == Term(1, 2)
    leader.handle(events.MemberSaid(1, WorkerExited(JOB, Term(1, 2), 0, 0, -9)), 3.1)
    assert leader.running is None or leader.running.term > Term(1, 2)


def test_what_no_generation_descends_from_is_not_committed() -> None:
    """Its files are whole, and its parent is what the chain names: only the lineage tells that it must not be there."""
    durability = Durability(enabled=True)
    durability.choose(Term(1, 0), 0.0)
    durability.chosen(events.RestoreChosen(Term(1, 0), None), 0.0)
    first = Lineage().grown(Term(1, 1), None)
    durability.begin(first)
    state = StateId(20, 1, 1)
    assert commits(durability.ready(Pending(state, None, "{}", ()), Term(1, 1), 1.0)) == [state]
    durability.failed("no answer", superseded=False, now=2.0)
    again = Durability.push(durability, Term(1, 1), 60.0)
    assert commits(again) == [state], "while the generation goes on it is tried again"
    durability.failed("no answer", superseded=False, now=61.0)
    durability.begin(first.grown(Term(1, 2), None))  # all copies are lost: from fresh weights
    assert commits(durability.push(Term(1, 2), 600.0)) == []


def test_an_order_whose_parent_the_chain_does_not_name_is_dropped() -> None:
    """What is uploaded for it says that it descends from a state that the chain has left."""
    leader = leading()
    state = StateId(10, 1, 1)
    told = leader.handle(events.MemberSaid(1, Staged(JOB, leader.term, 0, state, True)), 2.0)
    assert [order.state for order in orders(told)] == [state]
    assert leader.keeping.uploads.order is not None
    other = RestorePoint(StateId(5, 1, 1), "step-5-e1-g1/manifest.json", "00")
    leader.durability.known = False
    leader.durability.choose(leader.term, 3.0)
    leader.handle(events.RestoreChosen(leader.term, other), 3.0)
    order = leader.keeping.uploads.order
    assert order is None or order.parent == other


def test_no_restore_point_is_chosen_while_a_commit_is_under_way() -> None:
    """Nobody knows what the chain names until it is answered."""
    leader, state = leading(), StateId(10, 1, 1)
    leader.handle(events.MemberSaid(1, Staged(JOB, leader.term, 0, state, True)), 2.0)
    told = leader.handle(events.MemberSaid(1, Uploaded(JOB, leader.term, 0, state, (), "{}")), 3.0)
    assert commits(told) == [state]
    leader.handle(events.StoreLost("killed"), 3.5)
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), 4.0)
    leader.handle(events.StoreReady("10.0.0.1", 2), 4.0)
    assert leader.running is None
    point = RestorePoint(state, "step-10-e1-g1/manifest.json", "00")
    leader.handle(events.CommitDone(leader.term, point, "s3://x/step-10-e1-g1/manifest.json", 0.1, 1, ()), 5.0)
    assert leader.running is not None


def commits(effects: list[Effect]) -> list[StateId]:
    return [effect.state for effect in effects if isinstance(effect, Commit)]


def orders(effects: list[Effect]) -> list[Upload]:
    found = [effect.message for effect in effects if isinstance(effect, SendMember)]
    return [message for message in found if isinstance(message, Upload)]


def test_a_commit_without_an_answer_is_asked_about() -> None:
    """It may have taken effect: whoever starts from what is known without asking starts behind the chain."""
    durability = Durability(enabled=True)
    durability.choose(Term(1, 0), 0.0)
    durability.chosen(events.RestoreChosen(Term(1, 0), None), 0.0)
    durability.begin(Lineage().grown(Term(1, 1), None))
    durability.ready(Pending(StateId(20, 1, 1), None, "{}", ()), Term(1, 1), 1.0)
    assert durability.choose(Term(1, 1), 1.5) == []
    durability.failed("no answer", superseded=False, now=2.0)
    durability.abandon()
    assert durability.choose(Term(1, 1), 3.0) == [ChooseRestore(Term(1, 1))]


def test_the_answer_to_another_commit_is_none() -> None:
    leader = leading()
    state, older = StateId(10, 1, 1), StateId(8, 1, 1)
    leader.durability.ready(Pending(state, None, "{}", ()), leader.term, 1.0)
    leader.handle(events.CommitDone(leader.term, RestorePoint(older, "step-8-e1-g1/manifest.json", "00")), 2.0)
    assert leader.durability.durable is None
    leader.handle(events.CommitDone(leader.term, RestorePoint(state, "step-10-e1-g1/manifest.json", "00")), 3.0)
    assert leader.durability.durable is not None


def test_a_start_is_obeyed_once() -> None:
    """It may be said again by a leader that has not heard that its generation is over."""
    member = Member(Identity(JOB, "pod", "uid", "boot"), MemberMemory(), leaderless_seconds=20.0, now=0.0)
    member.handle(events.Invited(Invite(JOB, 1, 0, "uid", "boot", "10.0.0.1:1")), 0.0)
    member.handle(events.StreamOpened(1), 0.0)
    start = Start(JOB, Term(1, 1), 1, 1, Rendezvous("10.0.0.1", 1, "1/1"), None)
    assert launches(member.handle(events.LeaderSaid(1, start), 1.0)) == 1
    member.handle(events.LeaderSaid(1, Abandon(JOB, Term(1, 1), "again")), 2.0)
    member.handle(events.WorkerEnded(Term(1, 1), 0, -9, 2.1), 2.1)
    assert member.workers.running is None
    assert launches(member.handle(events.LeaderSaid(1, start), 3.0)) == 0


def test_a_stopped_job_brings_its_newest_state_to_the_store_first() -> None:
    """Its workers may die of the stop: what they have left in memory is as good."""
    leader = leading()
    state = StateId(7, 1, 1)
    done = StepSummary(7, 1.9, 0.1, 2.0, 256, 1.0, 1e-3)
    leader.handle(events.MemberSaid(1, Steps(JOB, leader.term, 0, (done,), "forward")), 2.0)
    leader.handle(events.MemberSaid(1, Staged(JOB, leader.term, 0, state, True)), 2.0)
    leader.handle(events.OperatorSaid(Stop(JOB, 1, "suspended", seconds=60.0)), 3.0)
    leader.handle(events.MemberSaid(1, WorkerExited(JOB, leader.term, 0, 0, -9)), 4.0)
    copies = (Copies(state, 0, 0),)
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0, Origin(Term(1, 1), 0), copies)), 5.0)
    leader.handle(events.StoreReady("10.0.0.1", 2), 5.0)
    assert leader.finished is None
    assert leader.running is not None, "workers begin from it, only to bring it to the store"


def test_the_answer_to_an_earlier_epochs_commit_of_the_same_state_is_none_of_ours() -> None:
    """It was late, and has failed for this epoch's fence: taken for ours it would say that another leader is newer."""
    leader = leading()
    state = StateId(10, 1, 1)
    leader.handle(events.MemberSaid(1, Staged(JOB, leader.term, 0, state, True)), 2.0)
    leader.handle(events.MemberSaid(1, Uploaded(JOB, leader.term, 0, state, (), "{}")), 3.0)
    assert leader.durability.busy
    leader.handle(events.CommitFailed(Term(0, 7), state, "superseded", superseded=True), 4.0)
    assert leader.durability.busy
    leader.handle(events.CommitDone(leader.term, RestorePoint(state, "step-10-e1-g1/manifest.json", "00")), 5.0)
    assert leader.durability.committed(state)


def test_a_last_state_that_its_slot_has_lost_is_computed_again_at_once() -> None:
    """Every GPU of the job stands idle until then. What may still come is waited for."""
    for gone in (False, True):
        leader = leading()
        last = StateId(100, 1, 1)
        done = StepSummary(100, 1.9, 0.1, 2.0, 256, 1.0, 1e-3)
        leader.handle(events.MemberSaid(1, Steps(JOB, leader.term, 0, (done,), "forward")), 2.0)
        leader.handle(events.MemberSaid(1, Staged(JOB, leader.term, 0, last, True)), 2.0)
        leader.handle(events.MemberSaid(1, WorkerExited(JOB, leader.term, 0, 0, 0)), 2.5)
        leader.handle(events.MemberSaid(1, UploadProblem(JOB, leader.term, 0, last, "503", gone=gone)), 2.6)
        said = [one.message for one in leader.handle(events.Tick(), 3.0) if isinstance(one, SendMember)]
        abandoned = [message.cause for message in said if isinstance(message, Abandon)]
        assert abandoned == (["FinalCheckpointMissing, slot None"] if gone else [])


def test_a_new_agent_goes_on_with_the_upload() -> None:
    order = Upload(JOB, Term(1, 1), StateId(10, 1, 1), None)
    remembered = HoldingsMemory(origin=Origin(Term(1, 1), 0), upload=UploadOrder(order))
    assert UploadState(order.term, order.state, None) in Holdings(remembered).resume(None)


def test_a_snapshot_that_workers_gave_up_on_is_not_tried_again() -> None:
    leader = leading()
    state = StateId(7, 1, 1)
    leader.handle(events.MemberSaid(1, Staged(JOB, leader.term, 0, state, True)), 2.0)
    copies = (Copies(state, 0, 0),)
    for number in (2, 3):
        leader.handle(events.MemberSaid(1, WorkerExited(JOB, leader.term, 0, 0, 1, error="it is damaged")), number)
        origin = Origin(leader.term, 7)
        leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0, origin, copies)), number + 0.5)
        leader.handle(events.StoreReady("10.0.0.1", number), number + 0.5)
        assert leader.running is not None
        assert (leader.running.memory is not None) is (number == 2)


def launches(effects: list[Effect]) -> int:
    return sum(isinstance(effect, Launch) for effect in effects)


def test_a_fault_that_waits_for_its_judgement_outlives_the_leaders_agent() -> None:
    """A worker and the leader's agent killed at once: the generation is over, and what ended it is not told yet."""
    leader = leading()
    leader.handle(events.StoreLost("killed"), 2.0)
    assert leader.running is None
    again = Leader(leader.plan, leader.membership, leader.memory(), 3.0)
    again.begin(3.0)
    here = Inventory(JOB, "pod", "uid", "boot", Term(1, 1), 1, 0, None, 0, None, 1, 1)
    again.handle(events.MemberConnected(1, Join(JOB, 1, 0, here)), 3.0)
    again.handle(events.MemberSaid(1, Quiesced(JOB, again.abandoned, 0)), 3.0)
    (report,) = again.reports.unacknowledged
    assert (report.cause, report.term, report.at) == ("StoreLost", Term(1, 1), 2.0)
    assert not again.verdicts.suspects
