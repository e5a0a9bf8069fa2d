"""A node loses power and there is no other: the job goes on with two of three, and takes it back when it returns.

What is protected: no pod that can't be scheduled stops a job which may be smaller; samples are exactly those of a run
that never was, whatever number of nodes trained them.
"""

from __future__ import annotations

from typing import Any

import pytest

from awaited import eventually
from demonstration import faults, install
from demonstration.target import Target
from e2e.jobs import NAMESPACE, POD_SPEC, TRAINER, RunningJob
from lockstep_api.v1alpha1 import TrainingJob

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 100_000
"""More than there is time for: how many are done on two nodes depends on how soon the third one is back."""


def whole_nodes(target: Target) -> dict[str, Any]:
    """A pod that takes all GPUs of a node, with one worker: there is room for as many pods as nodes."""
    (container,) = POD_SPEC["containers"]
    resources = container["resources"]
    nodes = target.kubectl("get", "nodes", "-o", "jsonpath={.items[*].status.allocatable.nvidia\\.com/gpu}").split()
    limits = {**resources["limits"], "nvidia.com/gpu": max(map(int, nodes))}
    return {**POD_SPEC, "containers": [{**container, "resources": {**resources, "limits": limits}}]}


def trains_on(job: RunningJob, nodes: int, seconds: float) -> TrainingJob:
    """Waits until so many nodes train, and have made steps."""
    found = job.until(
        lambda j: j.status.elastic.nodes == nodes and j.status.phase == "Running",
        seconds, f"training on {nodes} nodes",
    )  # fmt: skip
    return job.until_step(found.status.progress.step + 20, seconds)


def test_a_job_whose_node_is_gone_trains_on_the_others_until_it_returns(lockstep: Target) -> None:
    assert lockstep.cluster is not None
    recipe = {**TRAINER["recipe"], "steps": STEPS, "globalBatchTokens": 192}
    spec: dict[str, Any] = {
        "nodes": 3,
        "trainer": {**TRAINER, "recipe": recipe},
        "template": {"spec": whole_nodes(lockstep)},
        "resilience": {"elastic": {"minNodes": 2, "shrinkAfterSeconds": 5}},
    }
    with RunningJob.training(lockstep, "elastic", STEPS, every=20, **spec) as job:
        job.until_step(30, 600)
        pod = faults.pod_away_from(lockstep, NAMESPACE, job.name, install.operator_node(lockstep))
        node = pod["spec"]["nodeName"]
        faults.cut_node(lockstep, node)
        try:
            shrunk = trains_on(job, 2, 400)
        finally:
            lockstep.cluster.power_on(int(node.removeprefix("node")))
        assert node not in {pod["spec"]["nodeName"] for pod in job.pods()}
        told = next(each for each in shrunk.status.conditions if each.type == "Shrunk")
        assert told.status == "True"
        assert "Training on 2 of 3 nodes" in told.message
        assert shrunk.status.restarts.shrink == 1

        grown = trains_on(job, 3, 400)
        assert len(job.pod_names()) == 3
        eventually(lambda: "MembershipChanged" in job.event_reasons(), "the events of the changes", 10)
        job.kubectl("patch", "trainingjob", job.name, "--type=merge", "--patch", '{"spec": {"suspend": true}}')
        job.until_phase("Suspended", 240)
        verdict = job.check(ended=False)
        assert verdict.exact, verdict
        assert job.durable_step() > grown.status.progress.step - 20
        last = job.job.status
        assert sum(last.ledger.values()) == pytest.approx(
            sum(last.ledger_state.base.values()) + last.ledger_state.member_seconds, rel=0.01
        )
