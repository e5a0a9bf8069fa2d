"""Steps of a job out of its nodes' reports, hang bounds, parts of a recovery."""

from __future__ import annotations

import math
import random

from lockstep_api.messages import StepSummary
from lockstep_trainer.protocol.progress import HangBounds, Recovery, StepFold


def step(number: int, at: float = 0.0, seconds: float = 1.0, load: float = 0.0) -> StepSummary:
    return StepSummary(number, at, seconds, 2.0, 64, 1.0, 1e-3, {"load": load})


def test_fold_waits_for_all_nodes() -> None:
    """The last node sets the end, sections are means, and a step comes out once."""
    fold = StepFold(2)
    assert fold.add(0, [step(1, at=5.0, load=0.2)]) == []
    (whole,) = fold.add(1, [step(1, at=6.0, seconds=2.0, load=0.4)])
    assert (whole.at, whole.seconds, round(whole.sections["load"], 3)) == (6.0, 2.0, 0.3)
    assert fold.add(1, [step(1)]) == []


def test_fold_does_not_wait_for_a_node_that_is_away() -> None:
    """Steps of the others prove that it works: its stream is closed, no more."""
    fold = StepFold(2)
    done = [summary.step for number in range(1, 8) for summary in fold.add(0, [step(number)])]
    assert done == [1, 2, 3]


def test_fold_counts_what_nobody_else_will_report() -> None:
    """Of a generation that is over some reports never come."""
    fold = StepFold(2)
    fold.add(0, [step(1), step(2), step(3)])
    fold.add(1, [step(1)])
    assert [summary.step for summary in fold.rest()] == [2, 3]
    assert fold.rest() == []
    assert fold.add(1, [step(2)]) == []


def test_fold_survives_any_order() -> None:
    """Repeated and shuffled reports give each step once, in order."""
    draw = random.Random(0)
    for _ in range(50):
        reports = [(slot, number) for slot in range(3) for number in range(1, 5)] * 2
        draw.shuffle(reports)
        fold = StepFold(3)
        done = [summary.step for slot, number in reports for summary in fold.add(slot, [step(number)])]
        assert done == sorted(set(done))
        assert done[-1] == 4


def test_hang_bounds() -> None:
    """Before the first step and in sections that may be long, only the wide bound counts."""
    bounds = HangBounds(factor=5.0, minimum_seconds=60.0, first_step_seconds=1800.0)
    assert bounds.allowed(None, ["forward"]) == 1800.0
    assert bounds.allowed(2.0, ["forward", "checkpoint"]) == 1800.0
    assert bounds.allowed(2.0, ["forward"]) == 60.0
    assert bounds.allowed(20.0, ["forward"]) == 100.0
    assert bounds.allowed(20.0, ["forward", "outage"]) == math.inf, "a restart would wait for the same store"
    assert bounds.allowed_to_meet(["rendezvous", "build"]) == 300.0
    assert bounds.allowed_to_meet(["rendezvous", "data"]) == math.inf, "not all are there"
    assert bounds.allowed_to_meet(["rendezvous", "outage"]) == bounds.allowed_to_meet(["restore"]) == math.inf


def test_parts_of_a_recovery_sum_to_it() -> None:
    """Each part ends where the next begins, also where one was never seen."""
    recovery = Recovery(fault_at=10.0, noticed_at=10.5, highest=9, quiesced_at=11.0)
    recovery.section(0, "restore", 13.0)
    recovery.section(1, "restore", 13.1)
    recovery.section(0, "forward", 14.0)
    assert recovery.restored_at is None, "node 1 still restores"
    recovery.section(1, "forward", 14.5)
    recovery.first_step_at = 15.0
    seconds = recovery.seconds(18.0)
    assert seconds == {
        "detect": 0.5, "decide": 0.5, "restart": 2.0, "restore": 1.5, "first_step": 0.5, "recompute": 3.0,
    }  # fmt: skip
    assert sum(Recovery(10.0, 10.5, 9).seconds(18.0).values()) == 8.0
