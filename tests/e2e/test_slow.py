"""A rank that computes a third longer than the others is named, and its node is left for the spare's: no step is lost
or done twice, and training gives the losses that it gives undisturbed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from awaited import eventually
from demonstration.target import Target
from e2e.jobs import NAMESPACE, POD_SPEC, TRAINER, RunningJob
from e2e.test_nodes import remembered
from e2e.test_preflight import forget
from lockstep_api.v1alpha1 import TrainingJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

CODE = "slowdevice"
FOLDER = "/code"
STEPS = 100_000
"""More than it takes: for the last minutes of a run no node is left. No test sees its end."""
GPUS = 2
"""All of a node, so that each pod has one of its own; and four ranks, so that the slow one has peers."""
SLOW, SLOT = 3, 1
MORE = 0.00006
"""Seconds by which each matrix product of that rank takes longer: about a third of all its work, with this model."""
BEHIND = 40
"""Steps that are compared after the move."""


def slow_job(target: Target, name: str, **spec: Any) -> RunningJob:
    """A job whose ranks can be made slow."""
    pod = copy.deepcopy(POD_SPEC)
    (container,) = pod["containers"]
    container["resources"]["limits"]["nvidia.com/gpu"] = GPUS
    container["env"].append({"name": "PYTHONPATH", "value": FOLDER})
    container["volumeMounts"] = [{"name": "code", "mountPath": FOLDER}]
    pod["volumes"] = [{"name": "code", "configMap": {"name": CODE}}]
    recipe = {**TRAINER["recipe"], "steps": STEPS, "loss": "slowdevice:loss"}
    trainer = {**TRAINER, "recipe": recipe, "evaluate": None}
    return RunningJob.training(
        target, name, STEPS, every=STEPS, gpusPerNode=GPUS, trainer=trainer, template={"spec": pod}, **spec
    )


@pytest.fixture
def cluster_with_code(lockstep: Target) -> Iterator[Target]:
    """The loss is in the cluster, and nothing speaks against any node."""
    nodes = [item["metadata"]["name"] for item in lockstep.get("nodes")["items"]]
    forget(lockstep, nodes)
    text = Path(__file__).resolve().parents[1].joinpath("slowdevice.py").read_text()
    named = {"name": CODE, "namespace": NAMESPACE}
    lockstep.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": named, "data": {"slowdevice.py": text}})
    try:
        yield lockstep
    finally:
        lockstep.kubectl("-n", NAMESPACE, "delete", "configmap", CODE, "--ignore-not-found")
        forget(lockstep, nodes)


def left(job: TrainingJob) -> bool:
    """It goes on elsewhere, and what that has cost is known."""
    return any(fault.cause == "Straggler" and fault.steps_lost is not None for fault in job.status.faults)


def losses(job: RunningJob, last: int) -> dict[int, list[float]]:
    """Step → the losses that its computations gave, from the journal, which has them some time after the status."""
    found: dict[int, list[float]] = {}

    def all_told() -> bool:
        found.clear()
        for line in job.journal("step"):
            if line["step"] <= last:
                found.setdefault(line["step"], []).append(line["loss"])
        return len(found) == last

    eventually(all_told, f"all of {last} steps in the journal", 60)
    return found


def test_a_slow_rank_is_named_and_its_node_left_without_a_lost_step(cluster_with_code: Target) -> None:
    target = cluster_with_code
    swap = {"stragglers": {"action": "Swap"}}
    with slow_job(target, "slow", spares=1, resilience=swap) as job:
        before = job.until(lambda now: now.status.progress.step >= 30 and now.status.members.spares == 1, 240, "spare")
        pod = before.status.slots[str(SLOT)]
        node = next(one["spec"]["nodeName"] for one in job.pods() if one["metadata"]["name"] == pod)
        order = f"import os, pathlib; pathlib.Path(os.environ['LOCKSTEP_RUN_DIR'], 'slow').write_text('{SLOW} {MORE}')"
        target.exec(NAMESPACE, pod, ["python3", "-c", order])

        after = job.until(left, 500, "the move of the slow rank's slot")
        # Of three ranks beside it two are references: what they tell of noise lets the third be named with it at times.
        named = [one for one in after.status.verdicts if SLOW in one.ranks]
        assert {(one.kind, *one.nodes) for one in named} == {("Slow", node)}, job.story()
        assert all(set(one.ranks) <= {SLOW, SLOW - 1} for one in named), job.story()
        fault = next(one for one in after.status.faults if one.cause == "Straggler")
        assert (fault.pod, fault.node, fault.rung, fault.witness) == (pod, node, "spare", "ownWork")
        assert (fault.steps_lost, after.status.restarts.total) == (0, 1), job.story()
        assert after.status.slots[str(SLOT)] != pod
        assert [one.node for one in after.status.excluded_nodes] == [node]
        assert after.status.budgets_used.pod == 0

        last = after.status.progress.step + BEHIND
        ended = job.until(
            lambda now: now.status.progress.step >= last
            and all(one.ended for one in now.status.verdicts if SLOW in one.ranks),
            240, "steps without that verdict",
        )  # fmt: skip
        assert pod not in {one["metadata"]["name"] for one in job.pods()}
        assert len(ended.status.faults) == 1, job.story()
        eventually(lambda: node in remembered(job), "it is remembered across jobs", 10)
        assert {one["cause"] for one in remembered(job)[node]["faults"]} == {"Straggler"}
        said = {"SlowRank", "Straggler", "NodeExcluded", "MembershipChanged", "Recovered", "SlowRankEnded"}
        eventually(lambda: said <= job.event_reasons(), "the events of it", 10)
        moved = losses(job, last)
    assert {step: len(found) for step, found in moved.items() if len(found) > 1} == {}, "steps that were done twice"

    forget(target, [node])
    with slow_job(target, "calm") as job:
        job.until_step(last, 400)
        assert losses(job, last) == moved
