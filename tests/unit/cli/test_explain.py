"""``lockstep why`` in every phase: one table of statuses and what is said of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from lockstep_api.v1alpha1 import CheckpointSpec, TrainerSpec, TrainingJob
from lockstep_cli import explain, statustable

NOW = 1_790_000_000.0


def rfc3339(ago: float) -> str:
    return datetime.fromtimestamp(NOW - ago, UTC).isoformat()


def make_job(**status: Any) -> TrainingJob:
    spec = {"nodes": 2, "gpusPerNode": 2, "command": ["python", "train.py"]}
    return TrainingJob.model_validate({"metadata": {"name": "a"}, "spec": spec, "status": status})


TRAINER = TrainerSpec.model_validate(
    {
        "model": {"preset": "llama-debug"},
        "data": {"sources": [{"uri": "file:///text/*.txt"}], "sequenceLength": 16},
        "recipe": {"steps": 9, "globalBatchTokens": 64},
    }
)
FAULT = {
    "at": rfc3339(3 * 3600), "cause": "NodeLost", "rung": "spare", "node": "gpu-17", "stepsLost": 6,
    "seconds": {"detect": 1.9, "decide": 0.2, "restart": 4.1, "restore": 2.2, "recompute": 3.0},
}  # fmt: skip
SLOW = {
    "kind": "Slow", "cause": "Memory", "ranks": [3], "nodes": ["gpu-9"], "since": 40, "slowdown": 0.5, "cost": 0.2,
    "evidence": "Its copy took 50 % longer", "at": rfc3339(60),
}  # fmt: skip
CORRUPT = {
    "kind": "Corrupt", "cause": "Intermittent", "ranks": [3], "nodes": ["gpu-9"], "since": 40, "confidence": 0.33,
    "evidence": "unit 3 was outvoted by two other units", "at": rfc3339(60),
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ({}, "No operator has seen this job yet"),
        (
            {
                "phase": "Running",
                "excludedNodes": [
                    {"node": "gpu-3", "since": rfc3339(60), "until": rfc3339(-60), "reason": "GpuUnhealthy"},
                    {"node": "gpu-4", "since": rfc3339(60), "until": rfc3339(1), "reason": "GpuUnhealthy"},
                ],
            },
            "Running. Its new pods stay away from gpu-3 (GpuUnhealthy).",
        ),
        (
            {"phase": "Running", "verdicts": [SLOW, {**SLOW, "ranks": [1], "ended": rfc3339(5)}]},
            "Running. Slow: rank 3 (node gpu-9) is slowed down by slow memory since step 40: 50% longer, at a cost of "
            "20.0% of the job's step time. Its copy took 50 % longer.",
        ),
        (
            {"phase": "Running", "progress": {"otherData": "up to step 12: the seed was 0, and is 1 now"}},
            "Running. Trained on other data up to step 12: the seed was 0, and is 1 now.",
        ),
        (
            {"phase": "Running", "verdicts": [CORRUPT]},
            "Running. Corrupt: rank 3 (node gpu-9) computed wrong numbers, first at step 40, now and then. Unit 3 was "
            "outvoted by two other units.",
        ),
        (
            {
                "phase": "Running",
                "injections": [
                    {"id": "a", "rank": 1, "node": "gpu-9", "what": "it was slow", "at": rfc3339(900)},
                    {"id": "b", "rank": 3, "what": "it does not come to its next collective", "at": rfc3339(40)},
                ],
            },
            "Running. A fault was made on purpose, by `lockstep inject`, on rank 3: it does not come to its next "
            "collective, 40 s ago.",
        ),
        ({"phase": "Pending", "members": {"starting": 2}}, "Pending: 0 of 2 members are ready, 2 pods are not up yet."),
        (
            {"phase": "Running", "progress": {"step": 41230, "at": rfc3339(1.9)}, "faults": [FAULT]},
            "Running. 1.9 s ago: step 41230. Last fault 3 h ago: a node was lost (node gpu-17); a spare took the slot "
            "in 11.4 s, 6 steps redone.",
        ),
        (
            {
                "phase": "Running",
                "elastic": {"nodes": 1},
                "conditions": [
                    {
                        "type": "Shrunk",
                        "status": "True",
                        "lastTransitionTime": rfc3339(1),
                        "message": "Training on 1 of 2 nodes. a-1-1: no node has room.",
                    }
                ],
            },
            "Running. Training on 1 of 2 nodes. a-1-1: no node has room.",
        ),
        (
            {"phase": "Suspended", "checkpoint": {"durable": {"step": 40, "uri": "x", "at": rfc3339(9)}}},
            "Suspended by spec.suspend. It goes on from step 40.",
        ),
        (
            {"phase": "Succeeded", "startTime": rfc3339(150), "completionTime": rfc3339(30), "progress": {"step": 9}},
            "Succeeded after 2 min: step 9.",
        ),
        (
            {
                "phase": "Failed",
                "conditions": [
                    {"type": "Failed", "status": "True", "lastTransitionTime": rfc3339(1), "message": "no such preset"}
                ],
            },
            "Failed after an unknown time. no such preset.",
        ),
    ],
)
def test_what_is_said(status: dict[str, Any], sentence: str) -> None:
    assert explain.why(make_job(**status), NOW).startswith(sentence)


def test_a_success_without_a_step_says_why() -> None:
    ended = {"phase": "Succeeded", "startTime": rfc3339(34), "completionTime": rfc3339(30)}
    assert explain.why(make_job(**ended), NOW) == "Succeeded after 4.0 s."  # a script's steps are not seen
    job = make_job(**ended, progress={"evalLoss": 2.5})
    spec = job.spec.model_copy(update={"trainer": TRAINER})
    assert explain.why(job.model_copy(update={"spec": spec}), NOW) == (
        "Succeeded after 4.0 s: checkpoint.resumeFrom had all steps already, held-out loss 2.500."
    )


def test_a_degraded_checkpoint_is_said_while_running() -> None:
    condition = {
        "type": "CheckpointDegraded",
        "status": "True",
        "lastTransitionTime": rfc3339(1),
        "message": "S3 does not answer",
    }
    assert "S3 does not answer." in explain.why(make_job(phase="Running", conditions=[condition]), NOW)


def test_what_is_said_of_a_local_run_that_never_started() -> None:
    said = explain.why(make_job(), NOW, local=True)
    assert said.startswith("Not started: `lockstep run` has made its folder and no more.")
    assert "kubectl" not in said


def test_a_job_that_only_waits_for_its_last_checkpoint_says_so() -> None:
    job = make_job(phase="Running", progress={"step": 100, "steps": 100, "at": rfc3339(60)})
    assert explain.why(job, NOW) == "Running. 60 s ago: step 100.", "without checkpoints there is nothing to wait for"
    spec = job.spec.model_copy(update={"checkpoint": CheckpointSpec(uri="s3://bucket")})
    said = explain.why(job.model_copy(update={"spec": spec}), NOW)
    assert said == "Running: all 100 steps are done; its last checkpoint is not yet in the store."


WRONG = "no such preset [/INST]"
REFUSED = {
    "at": rfc3339(5), "cause": "WorkerExited", "rung": "pod", "rank": 0, "exitCode": 65, "epoch": 1, "generation": 1,
    "seconds": {"detect": 0.0}, "message": WRONG,
}  # fmt: skip
FAILED = {"type": "Failed", "status": "True", "lastTransitionTime": rfc3339(1), "message": WRONG}


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"phase": "Failed", "conditions": [FAILED]}, "a worker died with exit code 65 (rank 0); the job ends."),
        ({"phase": "Recovering"}, f"a worker died with exit code 65 (rank 0): {WRONG}; a new pod takes the slot."),
        ({"phase": "Suspended"}, f"a worker died with exit code 65 (rank 0): {WRONG}; a new pod took the slot."),
    ],
)
def test_a_fault_without_a_recovery_has_no_price(status: dict[str, Any], told: str) -> None:
    """And where the job has failed of it nothing else was done; the reason is not told twice."""
    assert explain.why(make_job(**status, faults=[REFUSED]), NOW).endswith(f"Last fault 5.0 s ago: {told}")


def test_the_status_table_leaves_out_what_is_not_known() -> None:
    names = [name for name, _ in statustable.rows(make_job(phase="Pending"), NOW)]
    assert names == ["job", "phase", "members"]


def test_the_status_table_of_a_failed_job_says_why() -> None:
    job = make_job(phase="Failed", conditions=[FAILED], ledger={"starting": 16.0})
    rows = dict(statustable.rows(job, NOW))
    assert list(rows) == ["job", "phase", "reason", "GPU time"]
    assert rows["reason"] == WRONG, "whatever it looks like: nothing in it is markup"
