"""One job of a topology, watched from its start to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from awaited import eventually
from demonstration import install
from demonstration.target import Target
from e2e.jobs import NAMESPACE
from e2e.matrix.grounds import Grounds, Term
from e2e.matrix.losses import Losses
from e2e.matrix.topologies import Topology
from localcluster import Cluster
from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob

START_SECONDS = 300.0
END_SECONDS = 600.0
"""Bounds that a busy machine keeps too."""


class Leg:
    """A job that runs; use as a context manager."""

    def __init__(self, target: Target, topology: Topology, name: str, folder: Path) -> None:
        assert target.cluster is not None
        self.cluster: Cluster = target.cluster
        self.topology = topology
        self.job = topology.job(target, name)
        self._target, self._folder = target, folder
        self._stack = ExitStack()
        self.grounds: Grounds
        self._losses: Losses

    def __enter__(self) -> Leg:
        with ExitStack() as stack:
            stack.enter_context(self.job)
            self.grounds = Grounds(self.cluster, self.job, self._folder)
            self._losses = stack.enter_context(Losses(self.grounds, self._folder))
            self.job.until_step(1, START_SECONDS)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def left(self) -> int:
        """Steps that it has still to do."""
        return self.topology.steps - self.job.job.status.progress.step

    def put_right(self) -> None:
        """Waits until all nodes can be used, their past is forgiven, and the job has the pods of its slots alone."""
        nodes = [node.name for node in self.cluster.nodes]
        self.cluster.wait_nodes(nodes, self.cluster.record["gpus"])
        eventually(self._no_pod_too_many, f"{self.topology.nodes} pods and none of them in Terminating", 120)
        self._forgive()

    def _no_pod_too_many(self) -> bool:
        pods = self._target.get("pods", "-n", NAMESPACE, "-l", f"{constants.LABEL_JOB_NAME}={self.job.name}")["items"]
        going = [pod for pod in pods if "deletionTimestamp" in pod["metadata"]]
        phase = self.job.job.status.phase
        return not going and (len(pods) == self.topology.nodes or (phase is not None and phase.terminal))

    def _forgive(self) -> None:
        """As an administrator does: what broke here was no node's fault, and three nodes are soon all excluded."""
        label = f"{constants.LABEL_NODE_MEMORY}=true"
        for memory in self._target.get("configmaps", "-n", install.SYSTEM_NAMESPACE, "-l", label)["items"]:
            for node, text in (memory.get("data") or {}).items():
                if json.loads(text).get("faults"):
                    self._tool("nodes", "clear", node)

    def _tool(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "lockstep_cli", *arguments]
        done = subprocess.run(command, env=self._target.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def losses(self) -> dict[tuple[Term, int], float]:
        """(generation, step) → loss of the steps that a worker of rank 0 has done so far."""
        return self._losses.look()

    def run_undisturbed(self) -> dict[int, float]:
        """Step → loss, when nothing breaks."""
        ended = self.job.until_phase("Succeeded", END_SECONDS)
        assert ended.status.restarts.total == 0, f"the reference was disturbed: {ended.status.faults}"
        losses = {step: loss for (_, step), loss in self.losses().items()}
        missing = sorted(set(range(1, self.topology.steps + 1)) - set(losses))
        assert not missing, f"steps of the reference that were never seen: {missing}"
        return losses

    def finish(self, reference: dict[int, float]) -> TrainingJob:
        """Lets the job come to its end, and compares all of it with the job that nobody has disturbed."""
        ended = self.job.until_phase("Succeeded", END_SECONDS)
        verdict = self.job.check(self.topology.steps)
        assert verdict.exact, verdict
        losses = self.losses()
        missing = sorted(set(reference) - {step for _, step in losses})
        assert not missing, f"steps that were never seen: {missing}"
        # Of every generation, whether its steps stayed or were done again: bitwise.
        wrong = {place: loss for place, loss in losses.items() if loss != reference[place[1]]}
        assert not wrong, f"other losses than those of the undisturbed job: {wrong}"
        return ended


def operators_are_ready(target: Target) -> bool:
    """Whether all replicas of the operator are: one may have lost its node."""
    found = target.get("deployment", install.RELEASE, "-n", install.SYSTEM_NAMESPACE)["status"]
    return bool(found.get("readyReplicas", 0) == found.get("replicas", 0))
