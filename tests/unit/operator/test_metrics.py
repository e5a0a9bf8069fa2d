"""What the operator tells Prometheus of jobs."""

from __future__ import annotations

from typing import Any

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.metrics import OperatorMetrics
from lockstep_operator.plan.nodes.records import Records
from unit.operator.builders import make_job

TRAINER: dict[str, Any] = {
    "command": None,
    "checkpoint": {"uri": "file:///checkpoints"},
    "trainer": {
        "model": {"preset": "llama-debug"},
        "data": {"sources": [{"uri": "file:///text/*.txt"}], "sequenceLength": 16},
        "recipe": {"steps": 9, "globalBatchTokens": 64},
    },
}


class Memory:
    """Of no node."""

    held = ""

    def __init__(self) -> None:
        self.records: Records = {}

    def excluded(self) -> frozenset[str]:
        return frozenset()


def ledger(job: TrainingJob) -> dict[str, float]:
    """Class of GPU time → the value of its series."""
    registry = OperatorMetrics(lambda: [job], lambda: 0.0, Memory()).registry
    (family,) = (one for one in registry.collect() if one.name == "lockstep_job_ledger_gpu_seconds")
    return {sample.labels["class"]: sample.value for sample in family.samples}


def test_a_trainer_that_has_made_no_step_was_productive_for_no_time() -> None:
    """The goodput of all jobs counts those of which productive time is known."""
    status = TrainingJobStatus(ledger={"starting": 540_000.0})
    assert ledger(make_job(status=status, **TRAINER)) == {"productive": 0, "starting": 540_000}
    assert ledger(make_job(status=status)) == {"starting": 540_000}, "nobody knows a script's steps"


def test_the_ledgers_classes_are_as_the_status_has_them() -> None:
    status = TrainingJobStatus(ledger={"productive": 81.5, "recovering": 2.0})
    assert ledger(make_job(status=status, **TRAINER)) == {"productive": 81.5, "recovering": 2}
