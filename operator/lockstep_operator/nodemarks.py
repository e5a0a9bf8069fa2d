"""What the cluster is shown of excluded nodes, where the administrator allows it: a taint, a condition.

The taint keeps other systems' pods away too. The condition is for who reads nodes rather than our ConfigMap:
dashboards, node-problem-detector's remedies, auto-repair.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lockstep_api import constants
from lockstep_operator.errors import ApiError
from lockstep_operator.kube import NODES, STRATEGIC_PATCH, KubeClient, Manifest
from lockstep_operator.plan.nodes.exclusion import excluded
from lockstep_operator.plan.nodes.records import BY_ADMINISTRATOR, Exclusion, Records
from lockstep_operator.plan.observed import Node
from lockstep_operator.plan.times import rfc3339

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeMarks:
    """Makes nodes say what the records say. ``nodes`` gives the cluster's nodes as they are known now."""

    client: KubeClient
    nodes: Callable[[], Mapping[str, Node]]
    taint: bool = False
    condition: bool = False

    @property
    def wanted(self) -> bool:
        """Whether nodes are marked at all."""
        return self.taint or self.condition

    async def show(self, records: Records, now: float) -> None:
        """Once, on all nodes where it is not so yet. What is refused is tried again with the next pass."""
        out = set(excluded(records, now))
        for name, node in self.nodes().items():
            exclusion = records[name].exclusion if name in out else None
            try:
                if self.taint and (exclusion is not None) != (node.taint is not None):
                    await self._taint(name, exclusion)
                if self.condition and (exclusion is not None) != (node.marked == "True"):
                    await self._condition(name, exclusion, now)
            except ApiError as error:  # gone, changed meanwhile, or not allowed: the others need not wait
                log.warning("marks of node %s: %s", name, error)

    async def _taint(self, name: str, exclusion: Exclusion | None) -> None:
        manifest = await self.client.get(NODES.path(name=name))
        taints = [one for one in manifest["spec"].get("taints", []) if one["key"] != constants.TAINT_EXCLUDED]
        if exclusion:
            taints.append({"key": constants.TAINT_EXCLUDED, "value": exclusion.by, "effect": "NoSchedule"})
        body: Manifest = {
            "metadata": {"resourceVersion": manifest["metadata"]["resourceVersion"]},
            "spec": {"taints": taints},
        }
        await self.client.patch(NODES.path(name=name), body)

    async def _condition(self, name: str, exclusion: Exclusion | None, now: float) -> None:
        """Merged by the server into the conditions of others, by its type."""
        body = {"status": {"conditions": [condition(exclusion, now)]}}
        await self.client.patch(NODES.path(name=name, sub="status"), body, STRATEGIC_PATCH)


def condition(exclusion: Exclusion | None, now: float) -> Manifest:
    """The node's condition while it is excluded, and once it is not any more."""
    if exclusion is None:
        reason, message = "NotExcluded", "New pods of training jobs may come here."
    else:
        reason = "ByAdministrator" if exclusion.by == BY_ADMINISTRATOR else "TooManyFaults"
        why = f": {exclusion.reason}" if exclusion.reason else ""
        message = f"New pods of training jobs stay away{why}. `lockstep nodes` lists what jobs had trouble with here."
    return {
        "type": constants.NODE_CONDITION_EXCLUDED,
        "status": "False" if exclusion is None else "True",
        "reason": reason,
        "message": message,
        "lastTransitionTime": rfc3339(now),
        "lastHeartbeatTime": rfc3339(now),
    }
