"""The jobs that the faults happen to, one for each layout."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from demonstration.target import Target
from e2e.jobs import NAMESPACE, POD_SPEC, TRAINER, RunningJob
from e2e.matrix import harmful

EVERY = 10
"""Steps between durable checkpoints."""
SNAPSHOTS = 5
"""Steps between two states in memory."""
HANG_SECONDS = 10
"""Least time without a step that is a hang; a step takes a tenth of a second on a busy machine."""
GPUS_OF_A_NODE = 2
CODE = "harmful-code"
"""ConfigMap with the loss that can be told to fail."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A layout, on how many nodes, and how many steps one job of it does."""

    name: str
    steps: int
    gpus: int = 1
    nodes: int = 2
    parallelism: dict[str, int] = field(default_factory=dict)
    pace: float = 0.1
    """Seconds that each loss waits: steps of a length that fits the time in which a recovery is watched, and idle cores
    for the recoveries meanwhile. A pipeline computes a loss for each micro-batch."""

    def together(self) -> Topology:
        """The same ranks in one pod, where one node has room for them: one to start instead of two, and on a busy
        machine none to lose sight of the other, and no waiting. Losses don't depend on either."""
        ranks = self.nodes * self.gpus
        quick = replace(self, pace=0.0)
        return replace(quick, nodes=1, gpus=ranks) if ranks <= GPUS_OF_A_NODE else quick

    def job(self, target: Target, name: str) -> RunningJob:
        """A job of this layout."""
        trainer = {
            **TRAINER,
            "recipe": {**TRAINER["recipe"], "steps": self.steps, "loss": "harmful:summed"},
            "evaluate": None,
        }
        spec: dict[str, Any] = {
            "nodes": self.nodes,
            "gpusPerNode": self.gpus,
            "parallelism": self.parallelism,
            "trainer": trainer,
            "template": {"spec": self._pod()},
            "resilience": {
                "hang": {"minimumSeconds": HANG_SECONDS, "firstStepSeconds": 60},
                # The cluster has one node more than the job: with any of them excluded the next fault finds no room.
                "nodes": {"excludeSeconds": 1, "excludePerHour": 1000},
            },
        }
        memory = {"memory": {"every": SNAPSHOTS}}
        return RunningJob.training(target, name, self.steps, every=EVERY, checkpoint=memory, **spec)

    def _pod(self) -> dict[str, Any]:
        pod = deepcopy(POD_SPEC)
        (container,) = pod["containers"]
        # All of a node, whatever is used of it: two pods on one node would be lost by one fault.
        container["resources"]["limits"]["nvidia.com/gpu"] = GPUS_OF_A_NODE
        container["env"] += [
            {"name": "PYTHONPATH", "value": "/harmful"},
            {"name": harmful.PACE, "value": str(self.pace)},
        ]
        container["volumeMounts"] = [{"name": "code", "mountPath": "/harmful"}]
        pod["volumes"] = [{"name": "code", "configMap": {"name": CODE}}]
        return pod


TOPOLOGIES = {
    each.name: each
    for each in (
        Topology("dp2", 1500),
        Topology("pp2", 1500, parallelism={"pipeline": 2}, pace=0.02),
        Topology("tp2dp2", 1500, gpus=2, parallelism={"tensor": 2}),
    )
}
SHORT = Topology("short", 700)
"""Of the tests that run everywhere."""


def install_code(target: Target) -> None:
    """Puts the loss that can be told to fail into the cluster."""
    code = {"harmful.py": Path(harmful.__file__).read_text()}
    target.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": CODE, "namespace": NAMESPACE},
            "data": code,
        }
    )
