"""A rank that computes wrong numbers: its generation ends, its pod is given up, and nothing starts from what it may
have spoiled, whoever leads then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep_api.messages import (
    Abandon,
    Copies,
    Cut,
    FaultReport,
    Finished,
    Join,
    Origin,
    Quiesced,
    ReplaceRequest,
    RestorePoint,
    Staged,
    Start,
    StateId,
    Stop,
    Term,
    Uploaded,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.durability import PATIENCE_SECONDS, Durability, Pending
from lockstep_trainer.protocol.effects import (
    ChooseRestore,
    Commit,
    Journal,
    Persist,
)
from lockstep_trainer.protocol.lineage import Holding, Lineage, excluded, newest_complete
from lockstep_trainer.protocol.member import Identity, Member, MemberMemory
from lockstep_trainer.protocol.policy import Fail, Fault, Ladder, Replace, Used, decide, root_cause
from lockstep_trainer.protocol.rollback import bound
from unit.protocol.compared import JOB, SLOTS, Run, asked, point_of, sent, trained

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
