"""A node that fails its preflight checks is named, left and never given a slot, and the job trains elsewhere.

Each node's NVML answers come from a ConfigMap; the file of one node tells of a row of memory that waits for a reset.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from awaited import eventually
from demonstration.target import Target
from e2e.jobs import NAMESPACE, POD_SPEC, RunningJob
from gpu.recordings import edited
from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_cli import preflight

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NAME = "preflight"
SICK = "node2"
FOLDER = "/answers"


@pytest.fixture
def job(lockstep: Target) -> Iterator[RunningJob]:
    """A job of two members and a spare, each on a node of its own."""
    assert lockstep.cluster is not None
    nodes = [item["metadata"]["name"] for item in lockstep.get("nodes")["items"]]
    assert SICK in nodes
    data = {
        f"{node}.json": json.dumps([edited("row remap pending" if node == SICK else "healthy, with NVLinks")])
        for node in nodes
    }
    answers = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "data": data,
    }
    pod = copy.deepcopy(POD_SPEC)
    (container,) = pod["containers"]
    container["env"].append({"name": "LOCKSTEP_NVML_ANSWERS", "value": f"{FOLDER}/$(LOCKSTEP_NODE_NAME).json"})
    container["volumeMounts"] = [{"name": "answers", "mountPath": FOLDER, "readOnly": True}]
    pod["volumes"] = [{"name": "answers", "configMap": {"name": NAME}}]
    selector = {"matchLabels": {constants.LABEL_JOB_NAME: NAME}}
    apart = [{"labelSelector": selector, "topologyKey": "kubernetes.io/hostname"}]
    pod["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": apart}}
    forget(lockstep, nodes)  # what other tests did to them
    lockstep.apply(answers)
    try:
        with RunningJob.training(lockstep, NAME, 40, spares=1, template={"spec": pod}) as running:
            yield running
    finally:
        lockstep.kubectl("-n", NAMESPACE, "delete", "configmap", NAME, "--ignore-not-found")
        forget(lockstep, [SICK])


def tool(target: Target, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command-line tool, run as a user does."""
    command = [sys.executable, "-m", "lockstep_cli", *arguments]
    return subprocess.run(command, env=target.environment, capture_output=True, text=True, check=False)


def forget(target: Target, nodes: list[str]) -> None:
    """Nothing speaks against these nodes any more."""
    for node in nodes:
        done = tool(target, "nodes", "clear", node)
        assert done.returncode == 0 or "nothing speaks against it" in done.stderr, done.stderr


def test_an_unfit_node_never_gets_a_slot(job: RunningJob) -> None:
    held: set[str] = set()

    def done(now: TrainingJob) -> bool:
        held.update(now.status.slots.values())
        return now.status.phase is not None and now.status.phase.terminal

    after = job.until(done, 400, "the end")
    assert after.status.phase == "Succeeded", job.story()
    failed = [fault for fault in after.status.faults if fault.cause == "PreflightFailed"]
    assert failed, job.story()
    assert {fault.node for fault in failed} == {SICK}
    assert all("a row of its memory waits to be replaced" in fault.message for fault in failed)
    assert held.isdisjoint(fault.pod for fault in failed)
    assert [one.node for one in after.status.excluded_nodes] == [SICK]
    assert after.status.budgets_used.pod == 0
    eventually(lambda: "PreflightFailed" in job.event_reasons(), "an event says so", 10)


def test_nodes_are_checked_without_a_job_and_nothing_is_left(lockstep: Target) -> None:
    where = ("--image", lockstep.trainer_image, "--gpus", "1", "--tier", "Quick", "--namespace", NAMESPACE)
    done = tool(lockstep, "preflight", "node0", "node1", *where, "--output", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    nodes = json.loads(done.stdout)["nodes"]
    assert [(one["node"], one["result"]) for one in nodes] == [("node0", "fit"), ("node1", "fit")]
    assert [one["report"]["node"] for one in nodes] == ["node0", "node1"]
    found = lockstep.get("jobs", "-n", NAMESPACE, "-l", preflight.LABEL)["items"]
    assert [job for job in found if "deletionTimestamp" not in job["metadata"]] == []
