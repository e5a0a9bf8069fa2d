"""A job's life apart from faults: suspension, deletion, expiry, scripts of users' own, the operator's own node."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from awaited import eventually
from demonstration import faults, install
from demonstration.target import REPOSITORY, Target
from e2e.jobs import NAMESPACE, POD_SPEC, RunningJob
from lockstep_api.v1alpha1 import TrainingJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def left_of(target: Target, job: str) -> list[str]:
    """Everything in the namespace that is labelled with the job's name."""
    selector = f"lockstep.dev/job-name={job}"
    found = target.kubectl("get", "pods,services,configmaps,secrets", "-n", NAMESPACE, "-l", selector, "-o", "name")
    return found.split()


def test_a_suspended_job_goes_on_from_its_last_checkpoint(lockstep: Target) -> None:
    with RunningJob.training(lockstep, "pause", 400) as job:
        job.until(lambda j: j.status.checkpoint.durable is not None, 120, "a checkpoint")
        job.kubectl("patch", "trainingjob", job.name, "--type=merge", "-p", '{"spec":{"suspend":true}}')
        suspended = job.until_phase("Suspended", 60)
        assert job.pods() == []
        durable = suspended.status.checkpoint.durable
        assert durable is not None
        job.kubectl("patch", "trainingjob", job.name, "--type=merge", "-p", '{"spec":{"suspend":false}}')
        resumed = job.until_phase("Running", 120)
        assert resumed.status.progress.step >= durable.step
        job.until_phase("Succeeded", 180)
        verdict = job.check(400)
        assert verdict.exact, verdict


def test_a_deleted_job_leaves_nothing(lockstep: Target) -> None:
    with RunningJob.training(lockstep, "gone", 100_000) as job:
        job.until_step(1)
        assert left_of(lockstep, "gone")
        job.kubectl("delete", "trainingjob", job.name, "--wait=true", "--timeout=30s")
        eventually(lambda: not left_of(lockstep, "gone"), "all of the job's objects to go", 60)


def test_a_finished_job_expires(lockstep: Target) -> None:
    with RunningJob.training(lockstep, "brief", 5, ttlSecondsAfterFinished=3) as job:
        job.until_phase("Succeeded")
        found = ("get", "trainingjob", "brief", "-n", NAMESPACE, "--ignore-not-found", "-o", "name")
        eventually(lambda: not lockstep.kubectl(*found), "the job to expire", 60)
        eventually(lambda: not left_of(lockstep, "brief"), "all of the job's objects to go", 60)


def test_a_torchrun_script_survives_its_own_crash(lockstep: Target) -> None:
    script = Path(REPOSITORY, "tests/integration/run/user_script.py").read_text()
    name = {"name": "user-script", "namespace": NAMESPACE}
    lockstep.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": {"train.py": script}})
    pod: dict[str, Any] = deepcopy(POD_SPEC)
    pod["volumes"] = [{"name": "script", "configMap": {"name": "user-script"}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "script", "mountPath": "/script"}]
    pod["containers"][0]["env"].append({"name": "CRASH_AT_STEP", "value": "6"})
    command = ["python3", "/script/train.py", "/tmp"]
    with RunningJob(lockstep, "script", {"command": command, "template": {"spec": pod}}) as job:
        ended = job.until_phase("Succeeded")
        assert ended.status.restarts.process == 1
        assert any("crashing on purpose" in line for line in ended.status.faults[-1].log_tail)


def test_a_user_error_is_said_in_a_condition_and_not_tried_again(lockstep: Target) -> None:
    with RunningJob.training(lockstep, "wrong", 10, model={"preset": "llama-imaginary"}) as job:
        failed = job.until(lambda j: j.status.phase == "Failed", 90, "failure")
        assert failed.status.restarts.total == 0
        assert any("llama-imaginary" in c.message for c in failed.status.conditions if c.type == "Failed")


def test_a_job_waits_where_a_kubelet_refuses_its_pods(lockstep: Target) -> None:
    """A template that names its node goes by no scheduler, and that node's GPUs are taken: its kubelet says so."""
    there: dict[str, Any] = {**deepcopy(POD_SPEC), "nodeName": "node0"}
    all_gpus = deepcopy(there)
    all_gpus["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = 2
    one: dict[str, Any] = {"nodes": 1, "template": {"spec": there}}
    with RunningJob.training(lockstep, "refused", 5, **one) as job:
        job.until_phase("Succeeded")  # nothing else keeps it from the node
    with RunningJob.training(lockstep, "first", 100_000, nodes=1, gpusPerNode=2, template={"spec": all_gpus}) as first:
        first.until_step(1)
        with RunningJob.training(lockstep, "refused", 5, **one) as job:
            job.until(lambda now: now.status.incarnations.get("0", 0) >= 2, 60, "a third pod")
            waits = job.until(lambda now: said(now, "Ready", "PodRefused"), 60, "a word of why")
            assert any("Requested: 1, Available: 0" in one.message for one in waits.status.conditions), job.story()
            first.kubectl("delete", "trainingjob", first.name)
            ended = job.until_phase("Succeeded")
            assert (ended.status.budgets_used.pod, ended.status.restarts.total, ended.status.faults) == (0, 0, [])
            assert "PodRefused" in job.event_reasons()


def said(job: TrainingJob, kind: str, reason: str) -> bool:
    """Whether the job's condition of that kind gives that reason."""
    return any(one.type == kind and one.reason == reason for one in job.status.conditions)


def test_the_operators_node_loses_power_under_a_member(lockstep: Target) -> None:
    """Operator and a member are gone at once: the standby takes over by the Lease, and replaces the member."""
    assert lockstep.cluster is not None
    lease = ("get", "lease", "-n", install.SYSTEM_NAMESPACE, "-o", "jsonpath={.items[0].spec.holderIdentity}")
    with RunningJob.training(lockstep, "bereft", 800, every=20) as job:
        before = job.until_step(20)
        holder = lockstep.kubectl(*lease)
        operators = lockstep.get("pods", "-n", install.SYSTEM_NAMESPACE)["items"]
        node = next(pod["spec"]["nodeName"] for pod in operators if pod["metadata"]["name"] in holder)
        victims = [pod for pod in job.pods() if pod["spec"]["nodeName"] == node]
        faults.cut_node(lockstep, node)
        try:
            eventually(lambda: lockstep.kubectl(*lease) != holder, "the standby operator to take over", 60)
            if victims:
                job.until(
                    lambda j: j.status.restarts.pod > before.status.restarts.pod and j.status.phase == "Running",
                    120, "recovery",
                )  # fmt: skip
            job.until_phase("Succeeded", 240)
            verdict = job.check(800)
            assert verdict.exact, verdict
        finally:
            lockstep.cluster.power_on(int(node.removeprefix("node")))
