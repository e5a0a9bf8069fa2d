"""Where a state comes from and goes to when a node, a pod or the store is lost, on a real cluster.

One job goes through all of it. It makes no durable checkpoint of its own accord before its last step, so what it starts
from is either in memory or was saved because a pod was told to go. Two more jobs begin from one of its checkpoints.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest

from awaited import eventually
from demonstration import faults, install
from demonstration.target import Target
from e2e.jobs import NAMESPACE, POD_SPEC, RunningJob
from lockstep_api.v1alpha1 import Condition, DurableCheckpoint, TrainingJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

STEPS = 600
SNAPSHOTS = 20
"""Steps between two states in memory."""
NEVER = 100_000
"""Steps between durable checkpoints: only the last step is one."""
GRACE = 60
"""Seconds from SIGTERM to SIGKILL."""


@dataclass
class Saved:
    """What one test leaves to the next: the journal, which says where a generation began, is read at the end."""

    before: dict[str, TrainingJob] = field(default_factory=dict)  # fault → the job before it
    drained: DurableCheckpoint | None = None


@pytest.fixture(scope="module")
def saved() -> Saved:
    """Nothing yet."""
    return Saved()


@pytest.fixture(scope="module")
def job(lockstep: Target) -> Iterator[RunningJob]:
    """The job that all this happens to. Each test leaves it as soon as it trains again: it has few steps."""
    with training(lockstep, "saved") as running:
        running.until_step(1, 180)
        yield running


def training(target: Target, name: str, nodes: int = 2, **checkpoint: Any) -> RunningJob:
    """A job whose checkpoints are made when a pod is told to go, and at the end."""
    pod = {**deepcopy(POD_SPEC), "terminationGracePeriodSeconds": GRACE}
    memory = {"memory": {"every": SNAPSHOTS}}
    template = {"spec": pod}
    return RunningJob.training(
        target, name, STEPS, every=NEVER, checkpoint={**memory, **checkpoint}, nodes=nodes, template=template
    )


def kept(job: RunningJob) -> TrainingJob:
    """The job once it keeps a state in memory that is newer than what is in the store."""
    return job.until(lambda j: memory_step(j) > durable_step(j), 120, "a state in memory")


def recovered(job: RunningJob, before: TrainingJob) -> TrainingJob:
    """The job once it trains again, after one more lost pod."""
    pods = before.status.restarts.pod + 1
    return job.until(
        lambda j: j.status.restarts.pod == pods and j.status.phase == "Running", 120, f"{pods} replaced pods"
    )


def memory_step(job: TrainingJob) -> int:
    """Step of the newest state in memory that the status names; 0: none."""
    memory = job.status.checkpoint.memory
    return memory.step if memory else 0


def durable_step(job: TrainingJob) -> int:
    """Step of the newest checkpoint that the status names; 0: none."""
    durable = job.status.checkpoint.durable
    return durable.step if durable else 0


def degraded(job: TrainingJob) -> Condition | None:
    """The condition, where it is true."""
    return next((c for c in job.status.conditions if c.type == "CheckpointDegraded" and c.status == "True"), None)


def lockstep_tool(target: Target, *arguments: str) -> str:
    """What the tool prints, run as a user does."""
    keys = {"AWS_ACCESS_KEY_ID": target.s3.access_key, "AWS_SECRET_ACCESS_KEY": target.s3.secret_key}
    command = [sys.executable, "-m", "lockstep_cli", *arguments]
    done = subprocess.run(command, env={**target.environment, **keys}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_after_a_power_cut_the_state_comes_from_the_buddy(job: RunningJob, saved: Saved) -> None:
    """Nothing is durable yet: without the copy in another node's memory the job would begin anew."""
    assert job.target.cluster is not None
    before = saved.before["cut"] = kept(job)
    assert (durable_step(before), job.durable_step()) == (0, 0)
    victim = faults.pod_away_from(job.target, NAMESPACE, job.name, install.operator_node(job.target))
    node = victim["spec"]["nodeName"]
    faults.cut_node(job.target, node)
    try:
        after = recovered(job, before)
        assert node not in {pod["spec"]["nodeName"] for pod in job.pods()}
    finally:
        job.target.cluster.power_on(int(node.removeprefix("node")))
    assert after.status.progress.step > memory_step(before)
    job.until(lambda j: j.status.faults[-1].restored_from == "buddy", 60, "the status to say where the state was")
    assert (durable_step(after), job.durable_step()) == (0, 0)


def test_a_grace_period_too_short_for_the_store_promises_nothing(job: RunningJob, saved: Saved) -> None:
    before, pods = kept(job), job.pod_names()
    saved.before["killed"] = before
    job.kubectl("delete", "pod", pods[1], "--grace-period=1", "--wait=false")
    recovered(job, before)
    job.until(lambda j: durable_step(j) == job.durable_step(), 30, "the status to name what is in the store")


def test_a_drained_pod_leaves_a_checkpoint_behind(job: RunningJob, saved: Saved) -> None:
    before = saved.before["drained"] = kept(job)
    pod = faults.pod_away_from(job.target, NAMESPACE, job.name, install.operator_node(job.target))
    with faults.drained(job.target, pod["spec"]["nodeName"], job.name):
        assert job.durable_step() >= before.status.progress.step, "it was there before the pod had gone"
        recovered(job, before)
    told = job.until(lambda j: durable_step(j) == job.durable_step(), 30, "the status to name it")
    saved.drained = told.status.checkpoint.durable
    assert saved.drained is not None


def test_a_store_away_stops_no_step_and_the_last_one_waits_for_it(job: RunningJob) -> None:
    assert job.target.cluster is not None
    job.target.cluster.s3_stop()
    try:
        before = job.job
        assert before.status.progress.step < STEPS
        waiting = job.until(
            lambda j: j.status.progress.step == STEPS and degraded(j) is not None, 120, "CheckpointDegraded"
        )
        assert waiting.status.phase == "Running"
        assert waiting.status.restarts == before.status.restarts
        condition = degraded(waiting)
        assert condition is not None
        told = " ".join(lockstep_tool(job.target, "why", job.name, "-n", NAMESPACE).split())
        assert "its last checkpoint" in told
        assert "Could not connect" in told
        about = f"--field-selector=involvedObject.name={job.name}"
        events = ("get", "events", about, "-o", "jsonpath={.items[*].reason}")
        eventually(lambda: condition.reason in job.kubectl(*events).split(), "an event", 30)
        eventually(lambda: metric(job, "lockstep_checkpoint_degraded") == 1, "the metric", 30)
        assert job.job.status.phase == "Running"
    finally:
        job.target.cluster.s3_start()
    ended = job.until_phase("Succeeded", 60)
    assert degraded(ended) is None
    assert (durable_step(ended), job.durable_step()) == (STEPS, STEPS)
    verdict = job.check(STEPS)
    assert verdict.exact, verdict
    assert verdict.recomputed > 0


@pytest.mark.parametrize("fault", ["cut", "killed", "drained"])
def test_each_loss_cost_a_few_steps(fault: str, job: RunningJob, saved: Saved) -> None:
    before = saved.before[fault]
    restored = next(line for line in job.journal("restore") if line["epoch"] > before.status.epoch)
    assert restored["step"] >= memory_step(before), "what was kept is not lost"
    reached = max(line["step"] for line in job.journal("step") if line["at"] < restored["at"])
    assert reached - restored["step"] <= 2 * SNAPSHOTS, "one interval, and what was staged and not yet kept"
    if fault == "cut":
        assert restored["source"] == "memory"
    if fault == "drained":
        assert saved.drained is not None
        assert restored["step"] >= saved.drained.step


def test_other_jobs_begin_from_its_checkpoint(job: RunningJob, saved: Saved) -> None:
    """At the same layout bit for bit, on one node within rounding."""
    assert saved.drained is not None, "no checkpoint was left by the test of a drained pod"
    origin = saved.drained
    with ExitStack() as stack:
        begun = {
            nodes: stack.enter_context(training(job.target, f"resumed-{nodes}", nodes, resumeFrom=origin.uri))
            for nodes in (2, 1)
        }
        expected = losses(job, origin.step)
        for nodes, other in begun.items():
            other.until_phase("Succeeded", 200)
            restored = other.journal("restore")[0]
            assert (restored["step"], restored["manifest"]) == (origin.step, origin.uri)
            verdict = other.check(STEPS, origin=job)
            assert verdict.exact, verdict
            found = losses(other, origin.step)
            assert found == (expected if nodes == 2 else pytest.approx(expected, rel=1e-6))
        listed = {each.name: listing(job.target, each.uri) for each in (job, *begun.values())}
    assert [each["step"] for each in listed[job.name]][:2] == [STEPS, origin.step]
    for other in begun.values():
        (only,) = listed[other.name]
        assert (only["step"], only["whole"], only["newest"], only["parent"]) == (STEPS, True, True, origin.uri)


def losses(job: RunningJob, beyond: int) -> dict[int, float]:
    """Step → loss; steps that were done again had the same one."""
    found: dict[int, set[float]] = {}
    for line in job.journal("step"):
        found.setdefault(line["step"], set()).add(line["loss"])
    assert {step: each for step, each in found.items() if len(each) > 1} == {}
    return {step: each.pop() for step, each in sorted(found.items()) if step > beyond}


def listing(target: Target, uri: str) -> list[dict[str, Any]]:
    """What ``lockstep checkpoint ls`` says of a job's checkpoints."""
    told = lockstep_tool(target, "checkpoint", "ls", uri, "--endpoint", target.s3.endpoint_host, "--output", "json")
    (found,) = json.loads(told)["jobs"]
    checkpoints: list[dict[str, Any]] = found["checkpoints"]
    return checkpoints


def metric(job: RunningJob, name: str) -> float | None:
    """The newest value that Prometheus has of the job."""
    assert job.target.cluster is not None
    query = urllib.parse.urlencode({"query": f'max({name}{{namespace="{NAMESPACE}",job_name="{job.name}"}})'})
    with urllib.request.urlopen(f"{job.target.cluster.prometheus_url}/api/v1/query?{query}", timeout=10) as answer:
        result = json.load(answer)["data"]["result"]
    return float(result[0]["value"][1]) if result else None
