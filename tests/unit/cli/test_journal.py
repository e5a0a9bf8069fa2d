"""Folding a journal: what the report says must be what the lines say."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

import synthetic
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
