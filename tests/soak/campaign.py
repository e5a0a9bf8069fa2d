"""A soak from its beginning to its end: one job, faults until it has ended, and what there is to say of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awaited import eventually
from checker.check import Verdict
from demonstration.target import Target
from e2e.jobs import NAMESPACE, POD_SPEC, TRAINER, RunningJob
from localcluster import Cluster
from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob
from soak import paced as paced_loss
from soak.deck import Deck, Spared
from soak.harm import Blow, Harm
from soak.readings import Nodes, Reader, Reading, of_nodes

SHARE = 0.6
"""Of the time, in which the job makes steps: a guess that sets how many it has. With more it would end sooner."""
STRUCK = 0.1
"""Of the time, in which faults strike every part. Then some are spared, and live long enough to be measured."""
CHECKPOINT_SECONDS = 5.0
PATIENCE = 3.0
"""Mean gaps without a new step after which the next fault waits for one: otherwise a slow machine never gets on."""
BUDGET = 10_000
"""Restarts between two checkpoints. The default ones end a job that is struck every 20 s where checkpoints come once a
minute: that is what they are for, and not what is looked at here."""
NAME = "soak"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done."""

    seed: int
    minutes: float  # of faults, at most: then the job is left alone to end
    mean_gap: float = 20.0  # seconds between faults
    step_seconds: float = 1.0

    @property
    def steps(self) -> int:
        """Of the job."""
        return max(20, int(self.minutes * 60 * SHARE / self.step_seconds))


@dataclass(frozen=True, slots=True)
class Progress:
    """The job at one time."""

    at: float
    step: int
    phase: str
    goodput: float | None


@dataclass(frozen=True)
class Soaked:
    """What happened."""

    plan: Plan
    seconds: float  # from the job's first step to its end
    blows: list[Blow]
    spared: Spared
    progress: list[Progress]
    readings: list[Reading]
    before: Nodes  # without a job
    after: Nodes  # without it again
    ended: TrainingJob
    checked: Verdict
    recoveries: list[dict[str, Any]]  # the journal's lines


def soak(
    target: Target,
    folder: Path,
    plan: Plan,
    say: Callable[[str], None] = lambda line: None,
    tell: Callable[[int], None] = lambda step: None,
) -> Soaked:
    """Run it. ``folder`` takes the readings; ``tell`` is given the job's step.

    Raises AssertionError, with the job's story, where the job fails or takes four times as long as it should.
    """
    assert target.cluster is not None
    before, began = of_nodes(target.cluster, 0.0), time.monotonic()
    blows, progress = list[Blow](), list[Progress]()
    with Reader(target.cluster, folder / "readings.jsonl", began) as reader, _job(target, plan) as job:
        job.until_step(1, 300)
        first = time.monotonic()
        with Harm(job, target.cluster, began) as harm:
            for seen in _strikes(job, harm, plan, say):
                if isinstance(seen, Blow):
                    blows.append(seen)
                    say(line(seen))
                else:
                    progress.append(seen)
                    tell(seen.step)
        seconds = time.monotonic() - first
        ended = job.job
        assert ended.status.phase == "Succeeded", job.story()
        checked, recoveries = job.check(plan.steps), job.journal("recovered")
    say(f"the job has ended after {seconds / 60:.1f} min: {checked}")
    after = _settled(target.cluster, before, began)
    return Soaked(
        plan, seconds, blows, harm.spared, progress, reader.processes, before, after, ended, checked, recoveries
    )


def _strikes(job: RunningJob, harm: Harm, plan: Plan, say: Callable[[str], None]) -> Iterator[Blow | Progress]:
    """Faults for so many minutes, or until the job has ended; what is done and what is seen, as it happens."""
    deck = Deck(plan.seed, plan.mean_gap)
    first = time.monotonic()
    due, step, stepped, paced = first + deck.gap(), 0, first, True
    while True:
        now = time.monotonic()
        if seen := job.look(min(1.0, max(0.05, due - now))):
            if seen.status.progress.step > step:
                stepped = now
            step = seen.status.progress.step
            phase = seen.status.phase or "Pending"
            yield Progress(round(now - harm.began, 1), step, phase, seen.status.goodput)
            if seen.status.phase in ("Succeeded", "Failed"):
                return
        assert now - first < plan.minutes * 60 * 4 + 300, f"the job does not get on\n{job.story()}"
        if paced and now - first >= plan.minutes * 60:
            paced = False
            _pace(job.target, 0)
            say("no more faults, and no more pace: the job is left alone to end")
        if not harm.spared.node and now - first > plan.minutes * 60 * STRUCK:
            spared = harm.spare()
            say(f"from now on {spared.operator} and {spared.node} are spared: their memory is to be measured")
        if now >= due and paced and now - stepped < PATIENCE * plan.mean_gap:
            due = max(due, stepped) + deck.gap()
            if card := deck.draw(harm.fits):
                yield harm.strike(card, step)


def line(blow: Blow) -> str:
    """A fault, for a screen."""
    held = f", for {blow.hold:.0f} s" if blow.hold else ""
    what = f"{blow.kind}: {blow.target}{held}" if not blow.missed else f"{blow.kind}: missed ({blow.missed})"
    return f"{blow.at / 60:5.1f} min  step {blow.step:5}  {what}"


def _job(target: Target, plan: Plan) -> RunningJob:
    """Two nodes and a spare, with steps of a set length."""
    _pace(target, plan.step_seconds)
    pod: dict[str, Any] = deepcopy(POD_SPEC)
    # A pod to a node: otherwise all of them gather on the one that is spared.
    apart = {
        "labelSelector": {"matchLabels": {constants.LABEL_JOB_NAME: NAME}},
        "topologyKey": "kubernetes.io/hostname",
    }
    pod["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    pod["volumes"] = [{"name": "code", "configMap": {"name": "soak-code"}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "code", "mountPath": "/code"}]
    pod["containers"][0]["env"] += [
        {"name": "PYTHONPATH", "value": "/code"},
    ]
    job = RunningJob.training(
        target, NAME, plan.steps,
        every=max(1, round(CHECKPOINT_SECONDS / plan.step_seconds)),
        spares=1,
        template={"spec": pod},
        # A stopped worker is found in seconds, not in the minute that suits real steps.
        resilience={
            "hang": {"minimumSeconds": 5, "firstStepSeconds": 60},
            "budgets": {"inProcess": BUDGET, "process": BUDGET, "pod": BUDGET},
        },
    )  # fmt: skip
    trainer: dict[str, Any] = job.manifest["spec"]["trainer"]
    trainer["recipe"]["loss"] = "paced:summed"
    trainer["evaluate"] = {**TRAINER["evaluate"], "every": plan.steps}
    return job


def _pace(target: Target, seconds: float) -> None:
    """How long a step takes; running pods learn of it within a minute or two."""
    data = {"paced.py": Path(paced_loss.__file__).read_text(), "seconds": str(seconds)}
    name = {"name": "soak-code", "namespace": NAMESPACE}
    target.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": data})


def _settled(cluster: Cluster, before: Nodes, began: float) -> Nodes:
    """What the nodes have once the job's pods are gone; kubelets take away what pods leave within a minute or two."""
    found = [before]

    def settled() -> bool:
        found.append(of_nodes(cluster, round(time.monotonic() - began, 1)))
        return found[-1].cgroups <= before.cgroups and found[-1].mounts <= before.mounts

    with suppress(AssertionError):  # the result says what was left
        eventually(settled, "the nodes to be as they were before the job", 150)
    return found[-1]
