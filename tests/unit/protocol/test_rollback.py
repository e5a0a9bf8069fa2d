"""A rank that computes wrong numbers: its generation ends, its pod is given up, and nothing starts from what it may
have spoiled, whoever leads then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import pytest

from lockstep_api.messages import (
    Abandon,
    Copies,
    Cut,
    Doubt,
    FaultReport,
    Finished,
    Inventory,
    Join,
    Membership,
    Origin,
    Quiesced,
    ReplaceRequest,
    RestorePoint,
    SlotInfo,
    Staged,
    Start,
    StateId,
    Steps,
    StepSummary,
    Stop,
    Term,
    Uploaded,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.corruption import PERSISTENT, WINDOW, Replays
from lockstep_trainer.protocol.durability import PATIENCE_SECONDS, Durability, Pending
from lockstep_trainer.protocol.effects import (
    ChooseRestore,
    Commit,
    Effect,
    Journal,
    Persist,
    SendLeader,
    SendMember,
    SendOperator,
)
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.keeping import TRIES
from lockstep_trainer.protocol.leader import Leader, LeaderMemory
from lockstep_trainer.protocol.lineage import Holding, Lineage, excluded, newest_complete
from lockstep_trainer.protocol.member import Identity, Member, MemberMemory
from lockstep_trainer.protocol.policy import Fail, Fault, Ladder, Replace, Used, decide, root_cause
from lockstep_trainer.protocol.rollback import bound

JOB = "job"
SLOTS = tuple(SlotInfo(n, f"pod-{n}", f"uid-{n}", "boot", f"10.0.0.{n}:1", f"node-{n}") for n in range(2))
Found = TypeVar("Found")


class Run:
    """A leader of two nodes with two ranks each. Slot 0 and 1 have streams 0 and 1."""

    def __init__(
        self,
        *,
        rollback: bool = True,
        spares: int = 0,
        epoch: int = 1,
        memory: LeaderMemory | None = None,
        slots: tuple[SlotInfo, ...] = SLOTS,
    ) -> None:
        self.now, self.epoch, self.spares, self.slots = 1.0, epoch, spares, slots
        plan = JobPlan(JOB, 2, 2, steps=1000, checkpoint_every=10, memory_buddy=False, rollback=rollback, spares=spares)
        self.leader = Leader(plan, Membership(JOB, epoch, slots), memory, 0.0)
        self.effects = self.leader.begin(0.0)
        self.tell(events.OperatorConnected())

    def form(
        self, restore: RestorePoint | None, *, cut: Cut | None = None, copies: tuple[Copies, ...] = ()
    ) -> list[Effect]:
        """All come, one of them with ``cut``; the chain answers; workers can meet."""
        told: list[Effect] = []
        for slot in (0, 1):
            here = Inventory(
                JOB, self.slots[slot].pod, self.slots[slot].pod_uid, "boot", Term(self.epoch, 0), None, slot, None, 0,
                None, 1, 1,
                snapshots=tuple(replace(copy, slot=slot) for copy in copies),
            )  # fmt: skip
            told += self.tell(events.MemberConnected(slot, Join(JOB, self.epoch, slot, here, cut if slot else None)))
        told += self.quiet(*copies)
        told += self.tell(events.RestoreChosen(self.leader.abandoned, restore, "s3://x/y"))
        return told + self.tell(events.StoreReady("10.0.0.0", 1))

    def tell(self, event: events.LeaderEvent) -> list[Effect]:
        self.now += 0.1
        told = self.leader.handle(event, self.now)
        self.effects += told
        return told

    def says(self, **line: Any) -> list[Effect]:
        """Rank 0 writes a line."""
        return self.tell(events.WorkerReported(line))

    def wrong(
        self,
        step: int,
        *,
        kind: str = "permanent",
        ranks: tuple[int, ...] = (3,),
        run: int = 1,
        calibration: bool = False,
    ) -> list[Effect]:
        """Units disagreed."""
        confidence, evidence = (0.0, "computations differ") if kind == "undecided" else (1.0, "outvoted")
        one = {"kind": kind, "ranks": list(ranks), "confidence": confidence, "evidence": evidence, "point": "ffn"}
        return self.says(
            kind="corruption", step=step, run=run, rejected=run == 1, calibration=calibration, verdicts=[one]
        )  # fmt: skip

    def doubt(self, step: int, *, calibration: bool = False) -> list[Effect]:
        """Two units did, and each repeats itself."""
        return self.wrong(step, kind="undecided", ranks=(0, 2), calibration=calibration)

    def answered(self, restore: RestorePoint) -> list[Effect]:
        """All workers have ended, and the chain knows of the cut."""
        return self.quiet() + self.tell(events.RestoreChosen(self.leader.abandoned, restore, "s3://x/y"))

    def again(self, restore: RestorePoint) -> list[Effect]:
        """The next generation of the same members."""
        told = self.answered(restore) + self.tell(events.StoreReady("10.0.0.0", 1))
        assert self.leader.running is not None
        return told

    def next_epoch(self, restore: RestorePoint, slot: int) -> Run:
        """The same leader in another one, in which that slot has another pod; it runs."""
        name = f"spare-{self.epoch}"
        spare = SlotInfo(slot, name, f"uid of {name}", "boot", f"10.0.1.{self.epoch}:1", f"node of {name}")
        slots = tuple(spare if info.slot == slot else info for info in self.slots)
        run = Run(epoch=self.epoch + 1, memory=self.leader.memory(), spares=self.spares, slots=slots)
        run.form(restore)
        assert run.leader.running is not None
        return run

    def journal(self, told: list[Effect], kind: str) -> list[dict[str, Any]]:
        """Lines of that kind."""
        return [each.line for each in told if isinstance(each, Journal) and each.line["kind"] == kind]

    def done(self, step: int) -> None:
        """All finish it."""
        for slot in (0, 1):
            summary = StepSummary(step, self.now, 1.0, 2.0, 64, 1.0, 1e-3)
            self.tell(events.MemberSaid(slot, Steps(JOB, self.leader.term, slot, (summary,), "forward")))

    def quiet(self, *copies: Copies) -> list[Effect]:
        """All workers have ended."""
        told: list[Effect] = []
        for slot in (0, 1):
            held = tuple(replace(copy, slot=slot) for copy in copies)
            told += self.tell(events.MemberSaid(slot, Quiesced(JOB, self.leader.abandoned, slot, None, held)))
        return told

    def commit(self, step: int) -> RestorePoint:
        """A state of the running generation becomes durable."""
        state = self.state(step)
        for slot in (0, 1):
            self.tell(events.MemberSaid(slot, Staged(JOB, self.leader.term, slot, state, True)))
        for slot in (0, 1):
            self.tell(events.MemberSaid(slot, Uploaded(JOB, self.leader.term, slot, state, (), "{}")))
        point = point_of(state)
        self.tell(events.CommitDone(self.leader.term, point, "s3://x"))
        assert self.leader.durability.durable == point
        return point

    def state(self, step: int) -> StateId:
        return StateId(step, self.leader.epoch, self.leader.generation)


def point_of(state: StateId) -> RestorePoint:
    return RestorePoint(state, f"step-{state.step}-e{state.epoch}-g{state.generation}/manifest.json", "00")


def sent(effects: list[Effect], kind: type[Found]) -> list[Found]:
    """Messages of one kind, to whomever."""
    found = [effect.message for effect in effects if isinstance(effect, SendMember | SendOperator | SendLeader)]
    return [message for message in found if isinstance(message, kind)]


def asked(effects: list[Effect]) -> list[ChooseRestore]:
    return [effect for effect in effects if isinstance(effect, ChooseRestore)]


def trained(*, spares: int = 0) -> tuple[Run, RestorePoint]:
    """Replays agreed at steps 1 and 12; states 10 and 20 are durable."""
    run = Run(spares=spares)
    run.form(None)
    run.says(kind="replayed", step=1)
    for step in range(1, 21):
        run.done(step)
        if step == 10:
            verified = run.commit(10)
        if step == 12:
            run.says(kind="replayed", step=12)
    run.commit(20)
    return run, verified


# --- the way down ---------------------------------------------------------------------------------------------------


def test_a_named_rank_loses_its_pod_and_the_run_goes_back_behind_the_last_step_that_agreed() -> None:
    run, verified = trained()
    first = run.leader.term
    told = run.wrong(25)
    cut = sent(told, Abandon)[0].cut
    assert cut is not None
    assert (cut.term, cut.step) == (first, 12)
    assert [order.cut for order in sent(told, Abandon)] == [cut, cut]
    assert "step 25" in cut.reason
    assert asked(told) == [ChooseRestore(first, cut)], "step 20 is durable, and must leave the chain"
    assert [each.line["step"] for each in told if isinstance(each, Journal) and each.line["kind"] == "rollback"] == [12]
    told = run.quiet()
    assert not sent(told, FaultReport), "the chain does not know of it yet"
    told = run.tell(events.RestoreChosen(first, verified, "s3://x"))
    (report,) = sent(told, FaultReport)
    assert (report.cause, report.witness, report.slot, report.rank) == ("Corruption", "arbiter", 1, 3)
    assert (report.rung, report.blame, report.step) == ("pod", "Named", 25)
    told = run.tell(events.Tick())
    (request,) = sent(told, ReplaceRequest)
    assert (request.slots, request.cause, request.witness) == ((1,), "Corruption", "arbiter")
    assert run.leader.running is None, "it waits for another pod"


def test_a_verdict_waits_for_the_chain_however_long_it_is_silent() -> None:
    """The simulation found a generation with the rank that computes wrong numbers still in it: its state was in memory,
    and began without an answer about a commit."""
    run = Run()
    run.form(None)
    state = run.state(10)
    for slot in (0, 1):
        run.tell(events.MemberSaid(slot, Staged(JOB, run.leader.term, slot, state, True)))
    for slot in (0, 1):
        run.tell(events.MemberSaid(slot, Uploaded(JOB, run.leader.term, slot, state, (), "{}")))
    run.tell(events.CommitFailed(run.leader.term, state, "no answer"))
    run.says(kind="replayed", step=12)
    run.wrong(25)
    run.quiet(Copies(state, 0, 0))
    run.now += PATIENCE_SECONDS
    run.quiet(Copies(state, 0, 0))
    assert run.leader.durability.silent(run.now)
    assert run.leader.running is None
    told = run.tell(events.RestoreChosen(run.leader.abandoned, point_of(state), "s3://x"))
    assert sent(told, FaultReport)


def test_a_second_run_of_the_step_changes_nothing() -> None:
    run, _ = trained()
    run.wrong(25)
    assert not sent(run.wrong(25, run=2), Abandon)
    assert len(run.leader.verdicts.suspects) == 1


def test_report_stops_nothing() -> None:
    run = Run(rollback=False)
    run.form(None)
    for step in range(1, 30):
        run.wrong(step)
        run.wrong(step, kind="undecided")
    assert run.leader.running is not None
    assert run.leader.keeping.cut is None
    assert run.leader.reports.replays.verdicts


def test_the_next_epoch_starts_from_the_verified_state_although_memory_has_newer_ones() -> None:
    """The same leader: it remembers. So does one that knows nothing but what a member has written down."""
    run, verified = trained()
    spoiled = Copies(run.state(24), 0, 20)
    run.wrong(25)
    run.quiet(spoiled)
    run.tell(events.RestoreChosen(run.leader.abandoned, verified, "s3://x"))
    cut = run.leader.keeping.cut
    assert cut is not None
    for memory, brought in ((run.leader.memory(), None), (None, cut)):
        again = Run(epoch=2, memory=memory)
        told = again.form(verified, cut=brought, copies=(spoiled,))
        start = again.leader.running
        assert start is not None
        assert (start.restore, start.memory, start.cut) == (verified, None, cut)
        assert [order.cut for order in sent(told, Start)] == [cut, cut]


def test_a_leader_that_hears_of_the_cut_late_asks_the_chain_again() -> None:
    """It had fenced the chain, and got a state that must not be used, before the member came that knows."""
    run = Run(epoch=2)
    cut, spoiled, verified = Cut(Term(1, 1), 12, "why"), point_of(StateId(20, 1, 1)), point_of(StateId(10, 1, 1))
    run.tell(events.RestoreChosen(run.leader.abandoned, spoiled, "s3://x/y"))
    assert run.leader.durability.known
    told = run.form(spoiled, cut=cut)
    assert ChooseRestore(run.leader.abandoned, cut) in asked(told)
    assert run.leader.running is None
    run.tell(events.RestoreChosen(run.leader.abandoned, verified, "s3://x/y"))
    assert run.leader.running is not None
    assert run.leader.running.restore == verified


def test_a_verdict_between_two_generations_still_counts() -> None:
    """Its line was read a moment after another fault had ended the generation."""
    run, verified = trained()
    run.tell(events.StoreLost("killed"))
    run.quiet()
    told = run.wrong(25)
    assert [order.cut.step for order in sent(told, Abandon) if order.cut] == [12, 12]
    run.quiet()
    told = run.tell(events.RestoreChosen(run.leader.abandoned, verified, "s3://x"))
    assert [report.cause for report in sent(told, FaultReport)] == ["Corruption"]


def test_what_was_cut_off_is_neither_kept_nor_committed() -> None:
    run, _ = trained()
    state = run.state(24)
    run.tell(events.MemberSaid(0, Staged(JOB, run.leader.term, 0, state, True)))
    run.wrong(25)
    told = run.tell(events.MemberSaid(1, Staged(JOB, run.leader.term, 1, state, True)))
    told += run.tell(events.MemberSaid(0, Uploaded(JOB, run.leader.term, 0, state, (), "{}")))
    told += run.tell(events.MemberSaid(1, Uploaded(JOB, run.leader.term, 1, state, (), "{}")))
    told += run.tell(events.Tick())
    assert run.leader.keeping.snapshots.kept is None or run.leader.keeping.snapshots.kept.step <= 12
    assert not [each for each in told if isinstance(each, Commit)]


# --- nobody to blame ------------------------------------------------------------------------------------------------


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
    run, verified = trained(spares=1)
    run.doubt(25)
    run.again(verified)
    run.doubt(11)
    run.answered(verified)
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
    run, verified = trained(spares=1)
    run.doubt(25)
    run.again(verified)
    run.doubt(11)
    run.answered(verified)
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
    run, verified = trained(spares=1)
    run.doubt(25)
    run.again(verified)
    run.doubt(11)
    run.answered(verified)
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


def test_a_stop_that_runs_out_of_time_still_tells_who_was_wrong() -> None:
    """The store is away, so that the chain can't learn of the cut."""
    run, _ = trained()
    run.wrong(25)
    told = run.tell(events.OperatorSaid(Stop(JOB, 1, "suspended", seconds=5.0)))
    assert not sent(run.quiet(), FaultReport)
    run.now += 6.0
    told = run.tell(events.Tick())
    told += run.quiet()
    assert [each.cause for each in sent(told, FaultReport)] == ["Corruption"]
    assert [each.outcome for each in sent(told, Finished)] == ["stopped"]


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


def test_ranks_of_several_pods_are_no_culprit() -> None:
    run, verified = trained()
    run.wrong(25, ranks=(1, 2))
    assert [each.cause for each in sent(run.again(verified), FaultReport)] == ["CorruptionSuspected"]
    told = run.wrong(26, ranks=(2, 3))
    told += run.answered(verified)
    assert [each.cause for each in sent(told, FaultReport)] == ["Corruption"], "both are of one pod"


CORRUPT = Fault("Corruption", "arbiter", 1.0, 1.0, step=25, slot=1, rank=3, error="outvoted", pod="pod-1")


def test_the_ladder_gives_a_corrupt_ranks_pod_up_at_once_and_never_for_the_same_step_of_two_pods() -> None:
    assert isinstance(decide(CORRUPT, [], Used(), Ladder(), intact=True), Replace)
    assert isinstance(decide(CORRUPT, [CORRUPT], Used(), Ladder()), Replace), "its pod was not gone yet"
    other = replace(CORRUPT, pod="pod-9")
    assert isinstance(decide(replace(other, step=26), [CORRUPT], Used(), Ladder()), Replace)
    again = decide(other, [CORRUPT], Used(), Ladder())
    assert isinstance(again, Fail)
    assert again.reason == "CorruptionRepeated"
    assert "pod-1 and then in pod-9" in again.message


def test_wrong_numbers_are_the_root_of_what_else_is_said() -> None:
    killed = Fault("WorkerExited", "exit", 0.5, 0.5, slot=0, rank=0, exit_code=-9)
    assert root_cause([killed, replace(killed, user_error=True), CORRUPT]) == CORRUPT


# --- what is verified -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agreed", "begun", "step", "expected"),
    [
        (12, 10, 25, 12),
        (25, 10, 25, 24),
        (None, None, 25, 0),
        (None, 10, 11, 10),
        (10, 20, 21, 10),
    ],
)
def test_the_bound_of_a_rollback(agreed: int | None, begun: int | None, step: int, expected: int) -> None:
    assert bound(agreed, None if begun is None else StateId(begun, 1, 1), step) == expected


def test_steps_that_are_left_behind_verify_nothing() -> None:
    """A generation that begins from step 10 descends from no step 12."""
    run, verified = trained()
    assert run.leader.durability.agreed == 12
    run.tell(events.StoreLost("killed"))
    run.quiet()
    run.leader.durability.found(verified, run.now)
    run.tell(events.StoreReady("10.0.0.0", 2))
    assert run.leader.running is not None
    assert (run.leader.keeping.agreed, run.leader.durability.agreed) == (10, 10)
    run.says(kind="replayed", step=11)
    assert run.leader.memory().keeping.agreed == 11  # type: ignore[union-attr]


def test_a_new_leader_knows_what_agreed_by_what_its_workers_restore() -> None:
    run = Run(epoch=2)
    restored = point_of(StateId(20, 1, 1))
    run.form(restored)
    run.says(kind="restore", source="store", step=20, manifest=restored.manifest, agreed=12)
    cut = sent(run.wrong(21), Abandon)[0].cut
    assert cut is not None
    assert cut.step == 12


def test_a_commit_says_up_to_where_states_are_verified() -> None:
    """Retention keeps the newest of them."""
    run, _ = trained()
    assert [each.agreed for each in run.effects if isinstance(each, Commit)] == [1, 12]


def test_copies_beyond_the_cut_are_not_started_from() -> None:
    cut = Cut(Term(1, 2), 12, "")
    held = {
        slot: Holding(Origin(Term(1, 2), 0), tuple(Copies(StateId(step, 1, 2), slot) for step in (10, 14)))
        for slot in (0, 1)
    }
    plain, found = newest_complete(SLOTS, held, None), newest_complete(SLOTS, held, None, cut=cut)
    assert plain is not None
    assert found is not None
    assert (plain.state.step, found.state.step) == (14, 10)
    assert excluded(StateId(13, 1, 1), cut)
    assert not excluded(StateId(13, 1, 3), cut), "a later generation's"


def test_a_lineage_ends_at_a_step() -> None:
    lineage = Lineage().grown(Term(1, 1), None).grown(Term(1, 2), StateId(10, 1, 1)).up_to(12)
    assert [lineage.holds(StateId(step, 1, 2)) for step in (12, 13)] == [True, False]
    assert lineage.holds(StateId(10, 1, 1))


def test_a_commit_that_took_effect_behind_the_cut_is_taken_back() -> None:
    durability = Durability(enabled=True)
    durability.choose(Term(1, 0), 0.0)
    durability.chosen(events.RestoreChosen(Term(1, 0), None), 0.0)
    state = StateId(20, 1, 1)
    durability.ready(Pending(state, None, "{}", ()), Term(1, 1), 1.0)
    cut = Cut(Term(1, 1), 12, "")
    durability.exclude(cut)
    durability.abandon()
    assert durability.choose(Term(1, 1), 2.0) == [], "the commit has no answer yet"
    durability.done(point_of(state), "s3://x", (), 3.0)
    assert durability.choose(Term(1, 1), 3.0) == [ChooseRestore(Term(1, 1), cut)]
    assert not durability.chosen(events.RestoreChosen(Term(1, 1), point_of(state)), 4.0)
    assert durability.choose(Term(1, 1), 4.0) == [ChooseRestore(Term(1, 1), cut)]


def test_another_jobs_state_is_beyond_no_cut_of_this_one() -> None:
    durability = Durability(enabled=True)
    foreign = RestorePoint(StateId(5000, 1, 1), "s3://other/step-5000-e1-g1/manifest.json", "00")
    durability.choose(Term(1, 0), 0.0)
    durability.chosen(events.RestoreChosen(Term(1, 0), foreign), 0.0)
    durability.exclude(Cut(Term(1, 1), 0, ""))
    assert durability.known


def test_a_member_writes_the_cut_down_before_it_is_quiet_and_tells_it() -> None:
    member = Member(Identity(JOB, "pod", "uid", "boot"), MemberMemory(), leaderless_seconds=20.0, now=0.0)
    member.epoch, member.slot, member.leader = 1, 0, "10.0.0.1:1"
    cut = Cut(Term(1, 1), 12, "why")
    told = member.handle(events.LeaderSaid(1, Abandon(JOB, Term(1, 1), "Corruption", cut)), 1.0)
    assert isinstance(told[0], Persist)
    assert sent(told, Quiesced)
    again = Member(Identity(JOB, "pod", "uid", "boot"), member.memory(), leaderless_seconds=20.0, now=2.0)
    (join,) = sent(again.handle(events.StreamOpened(1), 2.0), Join)
    assert join.cut == cut
    older = Cut(Term(1, 0), 5, "")
    again.handle(events.LeaderSaid(1, Abandon(JOB, Term(1, 1), "again", older)), 3.0)
    assert again.holdings.memory.cut == cut
