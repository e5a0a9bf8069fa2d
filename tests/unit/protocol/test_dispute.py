"""Two ranks disagree and nobody can say which is wrong: the step is made again, and pods are changed for a spare until
it agrees."""

from __future__ import annotations

from lockstep_api.messages import (
    Abandon,
    Copies,
    Doubt,
    FaultAck,
    FaultReport,
    Finished,
    ReplaceRequest,
    RestorePoint,
    SlotInfo,
    StateId,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.corruption import PERSISTENT, WINDOW, Replays
from lockstep_trainer.protocol.keeping import TRIES
from unit.protocol.compared import JOB, Run, point_of, sent, trained


def put_aside() -> tuple[Run, RestorePoint]:
    """Twice they disagreed, the second time at step 11: slot 1's pod is given up."""
    run, verified = trained(spares=1)
    run.doubt(25)
    run.again(verified)
    run.doubt(11)
    run.answered(verified)
    return run, verified


def test_a_disagreement_without_a_culprit_is_made_again_by_new_processes_on_the_same_pods() -> None:
    run, verified = trained()
    told = run.doubt(25)
    assert [order.cut.step for order in sent(told, Abandon) if order.cut] == [12, 12]
    told = run.again(verified)
    (report,) = sent(told, FaultReport)
    assert (report.cause, report.rung, report.slot, report.blame) == ("CorruptionSuspected", "process", None, "")
    start = run.leader.running
    assert start is not None
    assert (start.restore, start.doubt) == (verified, Doubt(25, ("ffn",)))
    run.says(kind="replayed", step=11)
    assert run.leader.reports.replays.dispute, "the step itself was not made again yet"
    told = run.says(kind="replayed", step=25)
    assert run.leader.reports.replays.dispute is None
    assert run.journal(told, "settled")
    assert not [one for one in run.leader.reports.replays.verdicts if one.kind == "Permanent"]


def test_disagreements_that_do_not_come_again_end_the_job_once_they_persist() -> None:
    run, verified = trained(spares=1)
    for number in range(PERSISTENT - 1):
        run.doubt(25 + number)
        run.again(verified)
        run.says(kind="replayed", step=25 + number)
    run.doubt(27)
    told = run.quiet()
    (end,) = sent(told, Finished)
    assert (end.outcome, end.reason) == ("failed", "CorruptionUndecided")
    for part in ("differ", "step 27", "lockstep preflight", "spec.spares", "resilience.corruption.action"):
        assert part in end.message


def test_without_a_spare_nobody_is_put_aside_and_the_third_time_ends_the_job() -> None:
    run, verified = trained()
    for _ in range(PERSISTENT - 1):
        run.doubt(25)
        told = run.again(verified)
        assert [each.rung for each in sent(told, FaultReport)] == ["process"]
    run.doubt(25)
    told = run.quiet()
    assert [each.reason for each in sent(told, Finished)] == ["CorruptionUndecided"]


def test_where_no_spare_is_ready_nobody_is_put_aside() -> None:
    """The job asks for one, and there is no room for it: a suspicion is no reason to wait."""
    run, verified = trained(spares=1)
    run.doubt(25)
    run.again(verified)
    run.tell(events.OperatorSaid(FaultAck(JOB, run.leader.abandoned, spares=0)))
    run.doubt(11)
    assert [each.rung for each in sent(run.again(verified), FaultReport)] == ["process"]
    run.tell(events.OperatorSaid(FaultAck(JOB, run.leader.abandoned, spares=1)))
    told = run.doubt(11)
    told += run.answered(verified)
    assert [each.slot for each in sent(told, FaultReport)] == [1]


def test_what_a_first_step_shows_is_left_out_while_no_spare_is_ready() -> None:
    run, verified = trained(spares=1)
    run.doubt(11, calibration=True)
    run.again(verified)
    run.tell(events.OperatorSaid(FaultAck(JOB, run.leader.abandoned, spares=0)))
    run.doubt(11)
    run.again(verified)
    assert run.leader.running is not None
    assert run.leader.running.doubt is None
    assert not sent(run.doubt(11, calibration=True), Abandon)
    run.tell(events.OperatorSaid(FaultAck(JOB, run.leader.abandoned, spares=1)))
    assert sent(run.doubt(11, calibration=True), Abandon), "in a later generation's"


def test_few_disagreements_among_many_steps_that_agree_end_nothing() -> None:
    run, verified = trained()
    step = 25
    for _ in range(2 * PERSISTENT):
        run.doubt(step)
        run.again(verified)
        for _ in range(WINDOW):
            step += 1
            run.says(kind="replayed", step=step)
    assert run.leader.running is not None


def test_the_pod_without_which_the_step_agrees_was_wrong() -> None:
    """Of two units that disagree again, slot 1's pod goes first: with slot 0's the leader would go, and what it
    knows."""
    run, verified = trained(spares=1)
    run.doubt(25)
    run.again(verified)
    told = run.doubt(11)
    assert run.leader.running is None
    told += run.answered(verified)
    (report,) = sent(told, FaultReport)
    assert (report.cause, report.rung, report.slot, report.rank) == ("CorruptionSuspected", "pod", 1, 2)
    assert report.blame == "", "it may be slot 0's"
    told = run.tell(events.Tick())
    assert [(each.slots, each.cause) for each in sent(told, ReplaceRequest)] == [((1,), "CorruptionSuspected")]
    run = run.next_epoch(verified, 1)
    start = run.leader.running
    assert start is not None
    assert start.doubt == Doubt(11, ("ffn",))
    told = run.says(kind="replayed", step=11)
    (settled,) = run.journal(told, "settled")
    assert (settled["pods"], settled["ranks"]) == (["pod-1"], [2])
    verdict = run.leader.reports.replays.verdicts[-1]
    assert (verdict.kind, verdict.ranks, verdict.pods, verdict.nodes) == ("Permanent", (2,), ("pod-1",), ("node-1",))
    assert (verdict.since, verdict.step, verdict.seen) == (25, 11, 2)
    assert verdict.ended is not None
    assert verdict.evidence.startswith("without pod-1, step 11 agrees; with it, ")
    assert run.leader.running is not None


def test_where_it_disagrees_without_the_first_the_other_is_put_aside_and_then_it_is_no_gpu() -> None:
    run, verified = put_aside()
    run = run.next_epoch(verified, 1)
    told = run.doubt(11)
    told += run.answered(verified)
    assert [(each.slot, each.rank) for each in sent(told, FaultReport)] == [(0, 0)]
    run = run.next_epoch(verified, 0)
    run.doubt(11)
    told = run.quiet()
    (end,) = sent(told, Finished)
    assert end.reason == "CorruptionUndecided"
    assert "also without pod-1, pod-0: it is no GPU" in end.message


def test_what_a_first_step_shows_without_a_culprit_is_looked_into_only_where_there_are_spares() -> None:
    run, _ = trained()
    assert not sent(run.doubt(11, calibration=True), Abandon)
    run, verified = trained(spares=1)
    assert sent(run.doubt(11, calibration=True), Abandon)
    run.again(verified)
    assert not sent(run.doubt(11, calibration=True), Abandon), "of other points than those that are doubted"
    for slot in (1, 0):
        told = run.doubt(11)
        told += run.answered(verified)
        assert [each.slot for each in sent(told, FaultReport)] == [slot]
        run = run.next_epoch(verified, slot)
    run.doubt(11)
    told = run.again(verified)
    assert [each.rung for each in sent(told, FaultReport)] == ["process"]
    assert run.leader.running is not None, "a library adds up in another order: no reason to end"
    assert run.leader.running.doubt is None
    assert not sent(run.doubt(11, calibration=True), Abandon), "nor to begin anew"


def test_on_another_number_of_nodes_a_dispute_says_nothing() -> None:
    run, _ = trained(spares=1)
    run.doubt(25)
    dispute = run.leader.reports.replays.dispute
    assert dispute is not None
    assert run.leader.reports.replays.doubt(2) == Doubt(25, ("ffn",))
    assert run.leader.reports.replays.doubt(1) is None
    assert run.leader.reports.replays.settled(25, 1, {}, 0.0).dispute is dispute


def test_what_is_in_dispute_outlives_the_leader_whose_pod_is_put_aside() -> None:
    """A member has written it down with the cut. What was settled before the state that is restored is over."""
    run, verified = put_aside()
    run = run.next_epoch(verified, 1)
    run.doubt(11)
    cut = run.leader.keeping.cut
    assert cut is not None
    spare = SlotInfo(0, "pod-8", "uid of pod-8", "boot", "10.0.0.8:1", "node-8")
    new = Run(epoch=3, spares=1, slots=(spare, run.slots[1]))
    new.form(verified, cut=cut)
    assert new.leader.running is not None
    assert new.leader.running.doubt == Doubt(11, ("ffn",))
    told = new.says(kind="replayed", step=11)
    (settled,) = new.journal(told, "settled")
    assert settled["pods"] == ["pod-0"]
    later = Run(epoch=4, spares=1)
    restored = point_of(StateId(30, 3, 1))
    later.form(restored, cut=cut)
    later.says(kind="restore", source="store", step=30, manifest=restored.manifest, agreed=22)
    assert later.leader.reports.replays.dispute is None


def test_where_another_of_the_accused_went_meanwhile_nobody_is_named() -> None:
    """Its node died while the spare of the first one was tried: it may have been wrong as well."""
    run, verified = put_aside()
    run.slots = (SlotInfo(0, "pod-7", "uid of pod-7", "boot", "10.0.0.7:1", "node-7"), run.slots[1])
    run = run.next_epoch(verified, 1)
    told = run.says(kind="replayed", step=11)
    (settled,) = run.journal(told, "settled")
    assert "pods" not in settled
    assert run.leader.reports.replays.dispute is None
    assert not [one for one in run.leader.reports.replays.verdicts if one.kind == "Permanent"]


def test_who_was_to_be_put_aside_and_is_still_there_is_put_aside_again() -> None:
    """Its leader was lost before it could say so. That the step disagrees says nothing of others."""
    run, verified = trained(spares=1)
    run.doubt(25)
    run.again(verified)
    run.doubt(11)
    cut = run.leader.keeping.cut
    new = Run(epoch=2, spares=1)
    new.form(verified, cut=cut)
    new.doubt(11)
    told = new.answered(verified)
    assert [(each.cause, each.slot) for each in sent(told, FaultReport)] == [("CorruptionSuspected", 1)]
    new = Run(epoch=3, spares=1)
    new.form(verified, cut=cut)
    new.says(kind="replayed", step=11)
    assert not new.leader.reports.replays.verdicts, "nor does it that it agrees"


def test_a_generation_that_disagrees_says_nothing_against_its_snapshot() -> None:
    run, verified = trained(spares=1)
    for _ in range(TRIES + 1):
        run.leader.reports.replays = Replays()
        run.doubt(25)
        run.quiet(Copies(StateId(12, 1, 1), 0, 10))
        run.tell(events.RestoreChosen(run.leader.abandoned, verified, "s3://x"))
        run.tell(events.StoreReady("10.0.0.0", 1))
        assert run.leader.running is not None
        assert run.leader.running.memory is not None
        assert run.leader.keeping.refused() == []
