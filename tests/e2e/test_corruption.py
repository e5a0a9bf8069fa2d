"""A pod whose hardware computes wrong numbers, on a real cluster: its rank is named, its node excluded, the run goes
back to a state that is verified, and its losses are those of a run in which nothing was wrong. Three ranks tell by
votes who it is, two with the help of a spare."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from awaited import eventually
from demonstration import install
from demonstration.target import Target
from e2e.jobs import NAMESPACE, POD_SPEC, TRAINER, RunningJob
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_trainer.injection.bitflips import VARIABLE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

NAME, CLEAN = "corrupt", "uncorrupted"
STEPS, EVERY, SHARE, SEED = 16, 3, 0.15, 4
WRONG = f"{NAME}-1-0"
BEGINS = 6
"""Steps of three micro-batches that pass before the first wrong gradient; fewer of those that are replayed."""
PATIENCE = 400.0


LONG = 200
"""Steps that last while a fault is ordered."""


def training(target: Target, name: str, action: str) -> RunningJob:
    """Three data-parallel ranks, so that two can outvote the third. The fault goes with the pod, whatever its rank."""
    faults = [
        {"rank": rank, "on": WRONG, "site": "gradient", "layer": 1, "bit": 22, "element": 3, "after": 3 * BEGINS}
        for rank in range(3)
    ]
    pod = copy.deepcopy(POD_SPEC)
    pod["containers"][0]["env"].append({"name": VARIABLE, "value": json.dumps(faults)})
    recipe = {**TRAINER["recipe"], "steps": STEPS, "globalBatchTokens": 288, "microBatchSize": 1, "seed": SEED}
    running = RunningJob.training(target, name, STEPS, every=EVERY, nodes=3, template={"spec": pod})
    running.manifest["spec"]["trainer"]["recipe"] = recipe
    running.manifest["spec"]["resilience"] = {"corruption": {"action": action, "sample": SHARE}}
    return running


def losses(job: RunningJob) -> dict[int, float]:
    """Step → loss, of the newest generation that did it."""
    lines = sorted(job.journal("step"), key=lambda line: (line["epoch"], line["generation"]))
    return {line["step"]: line["loss"] for line in lines}


def forget(target: Target) -> None:
    """Nothing speaks against any node any more."""
    for item in target.get("nodes")["items"]:
        command = [sys.executable, "-m", "lockstep_cli", "nodes", "clear", item["metadata"]["name"]]
        done = subprocess.run(command, env=target.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "nothing speaks against it" in done.stderr, done.stderr


@pytest.fixture
def jobs(lockstep: Target) -> Iterator[tuple[RunningJob, RunningJob]]:
    """(with the fault, without)."""
    forget(lockstep)
    try:
        with training(lockstep, NAME, "Rollback") as wrong, training(lockstep, CLEAN, "Off") as clean:
            yield wrong, clean
    finally:
        forget(lockstep)


@pytest.fixture
def pair(lockstep: Target) -> Iterator[tuple[RunningJob, RunningJob]]:
    """(two ranks and a spare, the same without replay); faults may be ordered."""
    forget(lockstep)
    recipe = {**TRAINER["recipe"], "steps": LONG, "globalBatchTokens": 256, "microBatchSize": 1, "seed": SEED}

    def job(name: str, action: str, spares: int) -> RunningJob:
        running = RunningJob.training(lockstep, name, LONG, every=EVERY, spares=spares)
        running.manifest["spec"]["trainer"]["recipe"] = recipe
        running.manifest["spec"]["resilience"] = {"corruption": {"action": action, "sample": SHARE}}
        return running

    install.helm_install(lockstep, {"replicas": 2, "faultInjection.enabled": "true"})
    try:
        with job("two", "Rollback", 1) as wrong:
            yield wrong, job("two-clean", "Off", 0)
    finally:
        install.helm_install(lockstep, {"replicas": 2})
        forget(lockstep)


def ended(job: RunningJob) -> TrainingJob:
    phases = ("Succeeded", "Failed")
    after = job.until(lambda now: now.status.phase in phases, PATIENCE, "the end")
    assert after.status.phase == "Succeeded", job.story()
    return after


def test_a_node_that_spoils_gradients_is_named_and_excluded_and_the_run_is_as_if_it_had_not(
    jobs: tuple[RunningJob, RunningJob], lockstep: Target
) -> None:
    job, clean = jobs
    job.until(lambda now: WRONG in now.status.slots.values(), PATIENCE, f"a slot for {WRONG}")
    node = lockstep.get("pod", WRONG, "-n", NAMESPACE)["spec"]["nodeName"]
    after = ended(job)
    (fault,) = [one for one in after.status.faults if one.cause == "Corruption"]
    assert (fault.pod, fault.node, fault.rung, fault.witness, fault.blame) == (WRONG, node, "pod", "arbiter", "Named")
    (verdict,) = [one for one in after.status.verdicts if one.kind == "Corrupt"]
    assert (verdict.cause, verdict.ranks, verdict.nodes) == ("Permanent", [fault.rank], [node])
    assert [(one.node, one.reason) for one in after.status.excluded_nodes] == [(node, "Corruption")]
    (cut,) = job.journal("rollback")
    assert cut["step"] < verdict.since
    resumed = next(line["step"] for line in job.journal("restore") if line["epoch"] > cut["epoch"])
    assert resumed <= cut["step"]
    eventually(lambda: "CorruptRank" in job.event_reasons(), "an event says so", 10)
    ended(clean)
    assert losses(job) == losses(clean)  # bitwise
    assert job.check(STEPS).exact


@pytest.mark.slow  # in CI `lockstep run` has it
@pytest.mark.parametrize("rank", [1, 0])
def test_of_two_ranks_that_disagree_a_spare_tells_which_is_wrong(
    rank: int, pair: tuple[RunningJob, RunningJob], lockstep: Target
) -> None:
    job, clean = pair
    before = job.until(
        lambda now: now.status.progress.step >= 5 and now.status.members.spares == 1, PATIENCE, "a spare"
    )
    first = before.status.slots
    nodes = {slot: lockstep.get("pod", pod, "-n", NAMESPACE)["spec"]["nodeName"] for slot, pod in first.items()}
    order = [
        "inject",
        job.name,
        "-n",
        NAMESPACE,
        "--rank",
        str(rank),
        "--site",
        "product",
        "--layer",
        "1",
        "--bit",
        "22",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lockstep_cli", *order],
        env=lockstep.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = ended(job)
    *undecided, named = [one for one in after.status.verdicts if one.kind == "Corrupt"]
    assert {(one.cause, *one.ranks) for one in undecided} == {("Undecided", 0, 1)}
    assert (named.cause, named.ranks, named.nodes) == ("Permanent", [rank], [nodes[str(rank)]])
    faults = [(one.cause, one.pod) for one in after.status.faults]
    cleared = [("CorruptionSuspected", first["1"])] if rank == 0 else []
    assert faults == [("CorruptionSuspected", None), *cleared, ("Corruption", first[str(rank)])], job.story()
    excluded = [(one.node, one.reason) for one in after.status.excluded_nodes]
    assert excluded == [(nodes[str(rank)], "Corruption")]
    if rank == 0:
        eventually(lambda: "NodeReleased" in job.event_reasons(), "an event says that the other was cleared", 10)
    assert job.check(LONG).exact
    wrong = losses(job)
    with clean:
        ended(clean)
        assert wrong == losses(clean)  # bitwise
