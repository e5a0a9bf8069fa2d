"""One job on a real cluster goes through every fault that a cluster has, and loses and repeats no sample.

The faults are done to one job one after another; each test waits until its own is mended.
"""

from __future__ import annotations

import json
import random
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from awaited import eventually
from demonstration import faults, install
from demonstration.target import REPOSITORY, Target
from e2e.jobs import NAMESPACE, RunningJob
from lockstep_api.v1alpha1 import TrainingJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

STEPS = 1200
_RANDOM = random.Random(4)
_HANGS = {"hang": {"minimumSeconds": 15}}
"""A step takes a tenth of a second, so this is a hang on the busiest machine."""


@pytest.fixture(scope="module")
def job(lockstep: Target) -> Iterator[RunningJob]:
    """The job that all this happens to."""
    with RunningJob.training(lockstep, "faults", STEPS, every=20, resilience=_HANGS) as running:
        running.until_step(1, 180)
        yield running


def settle(job: RunningJob) -> TrainingJob:
    """The job some steps later, at a random instant."""
    return job.until_step(job.job.status.progress.step + _RANDOM.randint(2, 20))


def test_a_worker_killed(job: RunningJob) -> None:
    before, pods = settle(job), job.pod_names()
    told = faults.kill_worker(job.target, NAMESPACE, _RANDOM.choice(pods))
    after = job.mended(before)
    fault = after.status.faults[-1]
    assert (fault.cause, fault.rung, fault.rank, fault.exit_code) == ("WorkerExited", "process", told["rank"], -9)
    assert job.pod_names() == pods
    eventually(lambda: {"WorkerExited", "Recovered"} <= job.event_reasons(), "the events of the fault", 10)


def test_a_worker_that_stands_still_is_named(job: RunningJob) -> None:
    """All the others wait for it, and look as stuck."""
    before = settle(job)
    pod = _RANDOM.choice(job.pods())
    told = faults.kill_worker(job.target, NAMESPACE, pod["metadata"]["name"], signal.SIGSTOP)
    after = job.mended(before)
    fault = after.status.faults[-1]
    named = (fault.cause, fault.rank, fault.pod, fault.node)
    assert named == ("Hang", told["rank"], pod["metadata"]["name"], pod["spec"]["nodeName"])
    eventually(lambda: "Hang" in job.event_reasons(), "the event of the hang", 10)


def test_an_agent_killed_costs_no_step(job: RunningJob) -> None:
    before = settle(job)
    for pod in job.pod_names():
        job.kill_in(pod, "lockstep_trainer.agent")
    after = job.until_step(before.status.progress.step + 60)
    assert after.status.restarts.total == before.status.restarts.total


def test_the_operator_killed_costs_no_step(job: RunningJob) -> None:
    before, pods = settle(job), job.pod_names()
    selector = f"app.kubernetes.io/instance={install.RELEASE}"
    namespace = install.SYSTEM_NAMESPACE
    job.target.kubectl("delete", "pods", "-n", namespace, "-l", selector, "--force", "--grace-period=0", "--wait=false")
    after = job.until_step(before.status.progress.step + 60)
    assert after.status.restarts.total == before.status.restarts.total
    assert job.pod_names() == pods


@pytest.mark.parametrize("slot", [1, 0], ids=["member", "leader"])
def test_a_pod_deleted_is_replaced(slot: int, job: RunningJob) -> None:
    before, pods = settle(job), job.pod_names()
    job.kubectl("delete", "pod", pods[slot], "--wait=false")
    after = job.mended(before)
    assert after.status.restarts.pod == before.status.restarts.pod + 1
    now = job.pod_names()
    assert now[slot] != pods[slot]
    assert now[1 - slot] == pods[1 - slot]
    job.until(lambda j: j.status.faults[-1].steps_lost is not None, 60, "what the fault has cost")


def test_an_s3_outage_delays_checkpoints_and_nothing_else(job: RunningJob) -> None:
    assert job.target.cluster is not None
    before = settle(job)
    job.target.cluster.s3_stop()
    try:
        degraded = job.until(lambda j: _condition(j, "CheckpointDegraded") == "True", 60, "CheckpointDegraded")
    finally:
        job.target.cluster.s3_start()
    after = job.until(lambda j: _condition(j, "CheckpointDegraded") == "False", 60, "checkpoints again")
    assert degraded.status.progress.step > before.status.progress.step
    assert after.status.restarts.total == before.status.restarts.total


def test_a_node_without_power_is_left_behind(job: RunningJob) -> None:
    assert job.target.cluster is not None
    before = settle(job)
    pod = faults.pod_away_from(job.target, NAMESPACE, job.name, install.operator_node(job.target))
    node = pod["spec"]["nodeName"]
    faults.cut_node(job.target, node)
    try:
        after = job.mended(before)
        assert node not in {pod["spec"]["nodeName"] for pod in job.pods()}
        assert after.status.faults[-1].rung == "pod"
    finally:
        job.target.cluster.power_on(int(node.removeprefix("node")))


def test_every_panel_of_the_dashboards_has_data(job: RunningJob) -> None:
    assert job.target.cluster is not None
    url = job.target.cluster.prometheus_url
    eventually(
        lambda: all(_query(url, expression, job) for expression in panels().values()),
        f"data for {[title for title, expression in panels().items() if not _query(url, expression, job)]}", 30,
    )  # fmt: skip


def test_it_ends_with_every_sample_once(job: RunningJob) -> None:
    job.until_phase("Succeeded", 280)
    verdict = job.check(STEPS)
    assert verdict.exact, verdict
    assert verdict.recomputed > 0
    assert job.job.status.goodput is not None


NEED_A_GPU = ("Model FLOPs utilisation", "Device memory")
"""Panels that a CPU has no data for: nobody knows its peak, and torch does not count its memory."""
FOR_TROUBLE = (
    "Slow ranks",
    "Wrong numbers",
    "Nodes: faults",
    "Which nodes are left out",
    "Nodes that jobs wait for",
    "The operator's errors",
)
"""Panels that are empty as long as there is none of it."""


def panels() -> dict[str, str]:
    """Title and number → query of every panel of the chart's dashboards that has data without a GPU, or trouble."""
    found = {}
    for file in sorted(Path(REPOSITORY, "charts/lockstep/files/dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            if panel["title"] in (*NEED_A_GPU, *FOR_TROUBLE):
                continue
            for number, query in enumerate(panel["targets"]):
                found[f"{panel['title']} ({panel['id']}.{number})"] = query["expr"]
    return found


def _query(url: str, expression: str, job: RunningJob) -> list[Any]:
    """What Prometheus answers, with the dashboard's variables filled in."""
    for variable, value in (
        ("$namespace", NAMESPACE),
        ("$job", job.name),
        ("$__range", "1h"),
        ("$__rate_interval", "1m"),
    ):
        expression = expression.replace(variable, value)
    query = urllib.parse.urlencode({"query": expression, "time": time.time()})
    with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as answer:
        result: list[Any] = json.load(answer)["data"]["result"]
    return result


def _condition(job: TrainingJob, kind: str) -> str:
    return next((c.status for c in job.status.conditions if c.type == kind), "Unknown")
