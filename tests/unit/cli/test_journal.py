"""Folding a journal: what the report says must be what the lines say."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

import synthetic
from lockstep_api import constants
from lockstep_api.v1alpha1 import Fault
from lockstep_cli import journal
from lockstep_cli.report import faults


@pytest.fixture
def told() -> journal.Journal:
    return journal.fold(synthetic.lines())


def test_the_lineage_has_every_step_once(told: journal.Journal) -> None:
    assert [step.step for step in told.lineage] == list(range(1, synthetic.STEPS + 1))


def test_steps_done_again_are_counted_and_marked(told: journal.Journal) -> None:
    assert told.recomputed == len(told.steps) - synthetic.STEPS
    assert told.recomputed == sum(fault.steps_lost or 0 for fault in told.faults)


def test_faults_carry_their_recovery_and_node(told: journal.Journal) -> None:
    killed, lost = told.faults
    assert (killed.cause, killed.rank, killed.exit_code, killed.node) == ("WorkerExited", 3, -9, "node-2")
    assert lost.rung == "pod"
    assert all(fault.recovered_at and fault.recovered_at > fault.at for fault in told.faults)
    assert lost.seconds["restart"] == 5.8


def test_the_ledger_is_the_sum_of_the_last_totals_of_each_epoch(told: journal.Journal) -> None:
    last = {line["epoch"]: line["classes"] for line in synthetic.lines() if line["kind"] == "ledger"}
    assert told.ledger["productive"] == pytest.approx(sum(classes["productive"] for classes in last.values()))
    assert told.goodput is not None
    assert 0.5 < told.goodput < 1


def test_a_leader_that_went_down_with_its_node_is_still_told_as_a_fault() -> None:
    # Nobody was left to write the fault line: the change of members is the only trace.
    lines = [line for line in synthetic.lines() if line["kind"] != "fault" or line["rung"] != "pod"]
    told = journal.fold(lines)
    assert len(told.faults) == 2
    assert told.faults[1].cause == "node node-2 is not ready"
    assert told.faults[1].recovered_at is not None


def test_a_fault_that_only_the_operator_saw_is_told_in_its_words() -> None:
    lines = [line for line in synthetic.lines() if line["kind"] != "fault" or line["rung"] != "pod"]
    told = journal.fold(lines)
    at = datetime.fromtimestamp(told.faults[1].at + 5, UTC).isoformat()
    seen = Fault(at=at, cause="NodeLost", rung="pod", witness="nodeCondition", node="node-2", seconds={"detect": 5.0})
    known, lost = faults.with_status(told, [seen]).faults
    assert known == told.faults[0]
    assert (lost.cause, lost.witness, lost.seconds["detect"]) == ("NodeLost", "nodeCondition", 5.0)


def test_a_run_that_goes_on_after_it_was_stopped_has_not_ended() -> None:
    """As when a job is suspended and resumed. An agent that is back in the epoch of the end changes nothing."""
    slots = {"0": {"pod": "demo-0-0", "node": "n"}}
    first = {"kind": "membership", "at": 1.0, "epoch": 1, "slots": slots}
    end = {"kind": "finished", "at": 2.0, "epoch": 1, "outcome": "stopped", "message": "spec.suspend is true"}
    ended = journal.fold([first, end, {**first, "at": 3.0}])
    assert (ended.outcome, ended.message) == ("stopped", "spec.suspend is true")
    resumed = journal.fold([first, end, {**first, "at": 9.0, "epoch": 2}])
    assert (resumed.outcome, resumed.message) == (None, "")


def line(kind: str, at: float, epoch: int = 1, **fields: object) -> dict[str, object]:
    """A line of the journal."""
    return {"kind": kind, "at": at, "epoch": epoch, "generation": 1, **fields}


def suspended_and_resumed() -> list[dict[str, object]]:
    """Two hours without pods; the pods that come then are new ones, with a leader that tells of its start."""
    slots = [{str(slot): {"pod": f"demo-{slot}-{life}", "node": "n"} for slot in (0, 1)} for life in (0, 1)]
    return [
        line("membership", 0.0, slots=slots[0], cause="first members"),
        line("finished", 60.0, outcome="stopped", reason="Stopped", message=constants.STOP_SUSPENDED),
        line("membership", 7260.0, 2, slots=slots[1], cause="slot 0 goes to demo-0-1"),
        line("recovered", 7280.0, 2, seconds={"restart": 15.0, "restore": 5.0}, steps_lost=0),
        line("ledger", 7300.0, 2, classes={}),
    ]


def test_a_suspension_is_no_fault() -> None:
    told = journal.fold(suspended_and_resumed())
    assert told.faults == ()
    assert told.suspensions == (journal.Suspension(60.0, 7260.0),)
    assert journal.fold(suspended_and_resumed()[:2]).suspensions == (journal.Suspension(60.0),)


def test_a_pod_that_is_lost_after_a_suspension_is_a_fault() -> None:
    third = {str(slot): {"pod": f"demo-{slot}-2", "node": "n"} for slot in (0, 1)}
    told = journal.fold([*suspended_and_resumed(), line("membership", 7400.0, 3, slots=third, cause="gone")])
    assert [fault.cause for fault in told.faults] == ["gone"]
    assert told.suspensions == (journal.Suspension(60.0, 7260.0),)


def test_faults_of_one_recovery_have_its_cost_once() -> None:
    told = journal.fold(
        [
            line("fault", 1.0, cause="WorkerExited", rung="process", detect_seconds=0.1),
            line("fault", 2.0, cause="WorkerExited", rung="process", detect_seconds=0.2),
            line("recovered", 9.0, seconds={"detect": 0.1, "restart": 7.0}, steps_lost=3),
            line("fault", 20.0, cause="WorkerExited", rung="process"),
            line("recovered", 24.0, seconds={"restart": 4.0}, steps_lost=1),
        ]
    )
    assert [fault.recovered_at for fault in told.faults] == [9.0, 9.0, 24.0]
    assert [sum(fault.seconds.values()) for fault in told.faults] == [7.1, 0.0, 4.0]
    assert [fault.steps_lost for fault in told.faults] == [3, None, 1]
    assert [fault.mended_with for fault in told.faults] == [None, 0, None]


def test_a_torn_last_line_is_passed_over() -> None:
    whole = b'{"kind": "text", "at": 1, "step": 1, "text": "a"}\n'
    assert journal.parse_lines(whole + b'{"kind": "st') == journal.parse_lines(whole)


def test_an_unknown_kind_of_a_newer_version_is_passed_over() -> None:
    assert journal.fold([{"kind": "hologram", "at": 3.0}]).steps == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [("checkpointStall", "checkpoint stall"), ("data_wait", "data wait"), ("productive", "productive")],
)
def test_ledger_classes_in_words(name: str, words: str) -> None:
    assert journal.plain_class(name) == words
