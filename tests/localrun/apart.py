"""``python -m localrun.apart run …``: `lockstep run` in which each pod is on a node of its own, as in a cluster.

The nodes are names, and the machine is one. A new pod goes to the node of its ordinal, or to the first other one that
has none and is not excluded for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from unittest.mock import patch

from lockstep_api.v1alpha1 import TrainingJob
from lockstep_cli.__main__ import main
from lockstep_operator import local_run
from lockstep_operator.backends.local import LocalBackend
from lockstep_operator.plan.actions import NewPod
from lockstep_operator.plan.observed import Node, Pod

NODES = ("node0", "node1", "node2", "node3")


class Apart(LocalBackend):
    """Pods on nodes."""

    _places: dict[str, str] | None = None

    def nodes(self) -> Mapping[str, Node]:
        return {name: Node(name) for name in NODES}

    def pods(self, job: TrainingJob) -> tuple[Pod, ...]:
        places = self._places or {}
        return tuple(replace(pod, node=places[pod.name]) if pod.node else pod for pod in super().pods(job))

    async def create_pod(self, job: TrainingJob, new: NewPod) -> None:
        """Creation is answered before the pod is seen: its node is known by then."""
        self._places = self._places or {}
        taken = {self._places[pod.name] for pod in super().pods(job) if pod.node}
        own = NODES[new.ordinal % len(NODES)]
        free = [node for node in (own, *NODES) if node not in taken and node not in new.exclude_nodes]
        self._places[new.name] = free[0]
        await super().create_pod(job, new)


if __name__ == "__main__":
    with patch.object(local_run, "LocalBackend", Apart):
        sys.exit(main())
