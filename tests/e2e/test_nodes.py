"""One job on a real cluster leaves its nodes for every reason there is, and no sample is lost or repeated.

The reasons come one after another; each test waits until the job has new steps and puts the node right again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from awaited import eventually
from demonstration import faults, install
from demonstration.target import Target
from e2e.jobs import NAMESPACE, RunningJob
from lockstep_api import constants
from lockstep_api.v1alpha1 import Fault, TrainingJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STEPS = 100_000
"""More than it takes: training goes on until the other pod's imports are loaded."""
PATIENCE = 240.0
"""Seconds that a recovery may take: a new pod imports torch, on whatever is left of this machine's cores."""
SPOT = "aws-node-termination-handler/spot-itn"
FEW = 5
"""Steps that workers may have gone beyond the last snapshot before they were ended; checkpoints are 20 apart."""


@pytest.fixture(scope="module")
def job(lockstep: Target) -> Iterator[RunningJob]:
    """The job that all this happens to."""
    with RunningJob.training(lockstep, "nodes", STEPS, every=20) as running:
        running.until_step(1, PATIENCE)
        yield running


def member(job: RunningJob) -> tuple[str, str]:
    """(pod, node) of a member, away from the operator if there is one."""
    operator = install.operator_node(job.target)
    members = sorted(job.pods(), key=lambda pod: pod["spec"]["nodeName"] == operator)
    return members[0]["metadata"]["name"], members[0]["spec"]["nodeName"]


def nodes_of(job: RunningJob) -> set[str]:
    """Where the members are."""
    return {pod["spec"]["nodeName"] for pod in job.pods()}


def mended(job: RunningJob, before: TrainingJob, cause: str) -> tuple[TrainingJob, Fault]:
    """The job with new steps after a fault of that cause, and that fault with what it has cost. A machine that is short
    of time may add faults of its own, so the newest need not be the one."""
    job.mended(before, PATIENCE)

    def known(j: TrainingJob) -> list[Fault]:
        return [fault for fault in j.status.faults if fault.cause == cause and fault.steps_lost is not None]

    after = job.until(lambda j: bool(known(j)), PATIENCE, f"what {cause} has cost")
    return after, known(after)[-1]


@contextmanager
def tainted(job: RunningJob, node: str, taint: str) -> Iterator[None]:
    """A cloud's notice, and its withdrawal."""
    job.target.kubectl("taint", "node", node, f"{taint}=true:NoSchedule")
    try:
        yield
    finally:
        job.target.kubectl("taint", "node", node, f"{taint}-")


def lost(fault: Fault) -> int:
    """Steps that were computed again."""
    assert fault.steps_lost is not None
    return fault.steps_lost


def test_a_spot_notice_moves_the_member_after_a_last_checkpoint(job: RunningJob) -> None:
    before = job.until_step(job.job.status.progress.step + 5)
    pod, node = member(job)
    with tainted(job, node, SPOT):
        after, fault = mended(job, before, "NodeLeaving")
        assert node not in nodes_of(job)
    assert (fault.pod, fault.node) == (pod, node)
    assert lost(fault) <= FEW
    assert SPOT in fault.message
    assert after.status.excluded_nodes == []


@pytest.mark.slow
def test_a_drained_node_is_left_for_another(job: RunningJob) -> None:
    before = job.until_step(job.job.status.progress.step + 5)
    _, node = member(job)
    with faults.drained(job.target, node, job.name):
        after, fault = mended(job, before, "NodeDrained")
        assert node not in nodes_of(job)
    assert (fault.node, fault.message) == (node, "EvictionByEvictionAPI")
    assert node not in {one.node for one in after.status.excluded_nodes}


@pytest.mark.slow
def test_a_node_without_power_is_blamed_and_nothing_hangs_in_terminating(job: RunningJob) -> None:
    """The member falls silent at once, its node is NotReady 50 s later; its pod can be ended by nobody."""
    assert job.target.cluster is not None
    before = job.until_step(job.job.status.progress.step + 5)
    pod, node = member(job)
    faults.cut_node(job.target, node)
    try:
        job.mended(before, PATIENCE)
        job.until(lambda j: "NodeLost" in {fault.cause for fault in j.status.faults}, 120, "the node's condition")
        gone = ("get", "pod", pod, "--ignore-not-found", "-o", "name")
        eventually(lambda: not job.kubectl(*gone).strip(), "the dead pod is deleted by force", 120)
    finally:
        job.target.cluster.power_on(int(node.removeprefix("node")))
    assert {fault.node for fault in job.job.status.faults if fault.cause == "NodeLost"} == {node}
    eventually(lambda: "NodeLost" in {one["cause"] for one in remembered(job)[node]["faults"]}, "it is remembered", 10)


def test_an_unhealthy_gpu_is_left_and_its_node_avoided(job: RunningJob) -> None:
    assert job.target.cluster is not None
    before = job.until_step(job.job.status.progress.step + 5)
    pod, node = member(job)
    device = job.target.exec(NAMESPACE, pod, ["printenv", "NVIDIA_VISIBLE_DEVICES"]).strip()
    number = int(node.removeprefix("node"))
    job.target.cluster.gpu_fail(number, device)
    try:
        after, fault = mended(job, before, "GpuUnhealthy")
        assert node not in nodes_of(job)
    finally:
        job.target.cluster.gpu_heal(number)
    assert (fault.node, fault.witness) == (node, "devicePlugin")
    assert lost(fault) <= FEW
    assert device in fault.message
    assert [one.node for one in after.status.excluded_nodes] == [node]
    eventually(lambda: "NodeExcluded" in job.event_reasons(), "an event says so", 10)
    eventually(lambda: node in remembered(job), "it is remembered across jobs", 10)
    assert "GpuUnhealthy" in {one["cause"] for one in remembered(job)[node]["faults"]}


def remembered(job: RunningJob) -> dict[str, Any]:
    """What the operator remembers, by node."""
    found = job.target.get("configmaps", "-n", install.SYSTEM_NAMESPACE, "-l", f"{constants.LABEL_NODE_MEMORY}=true")[
        "items"
    ]
    return {node: json.loads(text) for one in found for node, text in (one.get("data") or {}).items()}


def test_each_sample_was_used_once(job: RunningJob) -> None:
    job.kubectl("patch", "trainingjob", job.name, "--type=merge", "--patch", '{"spec": {"suspend": true}}')
    job.until_phase("Suspended", 240)
    # Workers go on until all keep the last state: what they make meanwhile is made again when the job is resumed.
    verdict = job.check(ended=False)
    assert verdict.exact, verdict
