"""Pods that must leave their node while they still run: it is about to be taken away, it is slow, or a GPU of theirs is
unhealthy.

Another pod is made ready first. Then, if steps advance, the leader is asked for a last checkpoint, and the slot moves.
That costs the time of one restart, and a step or two that workers began beyond the last snapshot; where the node is
only slow workers wait behind that snapshot, so that no step is done twice. Where no other pod comes up, nothing is
given away. A node that is only cordoned is not left: who drains it deletes the pods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lockstep_api.messages import Stop
from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.plan import swap
from lockstep_operator.plan.observed import Observed, Pod
from lockstep_operator.plan.pool import current
from lockstep_operator.plan.slots import fresh, usable, warm

CHECKPOINT_SECONDS = 20.0
"""What the last checkpoint before a move may take to become durable; after that memory and the buddy have to do. Notice
is 30 s on Azure and Google Cloud, 120 s on AWS (their documentation of spot machines)."""
PATIENT_SECONDS, PATIENT_STEPS = 120.0, 10
"""And where nothing presses: so long, and at least so many steps. Workers agree on the snapshot in one step and take it
behind the next; an evaluation or a slow copy to the buddy may come between."""

SETTLED_SECONDS = 60.0
"""A pod without a slot that is younger stays: it was put there in spite of all, by a template that tolerates any taint
say, and the next one would be too."""


@dataclass(frozen=True, slots=True)
class Departure:
    """Why a pod is to leave."""

    cause: str  # NodeLeaving, GpuUnhealthy, Straggler, NodeExcluded (spares only)
    witness: str
    why: str

    @property
    def presses(self) -> bool:
        """Whether the node may be gone before a last checkpoint is durable; else no step is to be lost."""
        return self.cause != swap.CAUSE


def departures(job: TrainingJob, status: TrainingJobStatus, observed: Observed, now: float) -> Mapping[str, Departure]:
    """Pod name → why it is to leave; members and others. A slow node waits for those that must be left: pods that are
    ready are for those first."""
    members = set(status.slots.values())
    pods = current(observed.pods, status.incarnations).values()
    found = {pod.name: why for pod in pods if (why := _departure(job, pod, observed))}
    kept_away = {one.node for one in status.excluded_nodes} | observed.excluded
    slow = swap.choose(job, status, observed, now)
    if slow and not slow.held and not members & found.keys():
        found[slow.pod] = Departure(swap.CAUSE, "ownWork", slow.why)
        kept_away |= {slow.node}
    elsewhere = observed.nodes.keys() - kept_away  # a single machine has no other node
    for pod in pods:
        if elsewhere and pod.node in kept_away and pod.name not in members:
            # It would be given a slot one day, on a node that no new pod is given.
            found.setdefault(pod.name, Departure("NodeExcluded", "memory", f"{pod.node} is excluded"))
    return found


def settled(pod: Pod, now: float) -> bool:
    """Whether a pod without a slot has been where it is for long enough to be moved."""
    return now - pod.created >= SETTLED_SECONDS


def _departure(job: TrainingJob, pod: Pod, observed: Observed) -> Departure | None:
    node = observed.nodes.get(pod.node)
    if pod.bad_device:
        return Departure("GpuUnhealthy", "devicePlugin", f"its device {pod.bad_device} is unhealthy")
    if node is None:
        return None
    if 0 < node.gpus_healthy < job.spec.gpus_per_node <= node.gpus:
        # Fewer are left than the pod holds. None at all is a device plugin that restarts: no fault, however long the
        # first step takes meanwhile.
        return Departure("GpuUnhealthy", "devicePlugin", f"{node.gpus_healthy} of {node.gpus} GPUs are healthy")
    if node.leaving:
        return Departure("NodeLeaving", "taint", node.leaving)
    return None


def heirs(status: TrainingJobStatus, observed: Observed, leaving: Mapping[str, Departure], now: float) -> int:
    """How many pods could take a leaving member's slot at once, their workers warm."""
    members = set(status.slots.values())
    return sum(
        1
        for pod in current(observed.pods, status.incarnations).values()
        if pod.name not in members
        and pod.name not in leaving
        and usable(pod, observed.agents)
        and fresh(pod, observed.agents, now)
        and warm(pod, observed.agents)
    )


def moving(status: TrainingJobStatus, leaving: Mapping[str, Departure]) -> list[Departure]:
    """Those that hold a slot."""
    return [leaving[name] for name in status.slots.values() if name in leaving]


def ask(
    job: TrainingJob, status: TrainingJobStatus, members: list[Departure], *, step_seconds: float = 0.0
) -> tuple[Stop, ...]:
    """The request for a last checkpoint before these members leave. ``step_seconds``: how long a step takes."""
    if not members:
        return ()
    text = "; ".join(sorted({one.why for one in members}))
    presses = any(one.presses for one in members)
    seconds = CHECKPOINT_SECONDS if presses else max(PATIENT_SECONDS, PATIENT_STEPS * step_seconds)
    reason = f"a member leaves its node: {text}"
    return (Stop(job.uid, status.epoch, reason, seconds=seconds, hold=not presses),)
