"""Who is lost, on whose word.

A slot is vacated when its pod is gone, or when two witnesses agree among: the operator's own connection, the streams
of leader and members, the node's condition, missing progress. One witness alone is believed only after
``resilience.leaderDeadlineSeconds``; a closed stream is no fault while steps advance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.plan.departures import Departure, settled
from lockstep_operator.plan.observed import Leader, Observed, Pod
from lockstep_operator.plan.pool import current
from lockstep_operator.plan.slots import FRESH_ANSWER
from lockstep_operator.plan.times import unix

AGREED_SILENCE = 5.0
"""Seconds of silence after which a leader is lost if a second witness agrees: rule 5 of docs/design/membership.md."""
LEAST_SILENCE = 2.0
"""An operator that has just taken over has tried to reach the leader for so long at least. Seconds that the members'
silence is beyond AGREED_SILENCE need no waiting of its own: both together count as twice that."""
POD_GIVEN_UP = frozenset({"pod", "spare", "shrink", "requeue"})
"""Rungs of a record whose pod is gone: one loss each."""
UNFIT = "PreflightFailed"
"""Uses up budget only where its node does not get excluded for it: see ``faults.charge_unfit``."""
REFUSED = "PodRefused"
"""A kubelet did not admit a pod: nothing is lost, so it uses up no budget and is no fault of the job."""
REFUSED_SECONDS = 10.0
"""So long after a refused pod was made comes the next: the scheduler does not know what its kubelet knows, a device
plugin that has just been restarted say, and would put it there again at once. Kubernetes' Job controller begins with
the same delay."""
LOOPING_SECONDS = 60.0
"""So long after it was made a pod that came for a vacant slot, and whose container loops, is given up. Its kubelet
starts the container again after 10, 20 and 40 s: a port that the pod before still had, say, is free by then. With the
default budget a job has some minutes, longer than it waits before it shrinks."""
PATIENCE_SECONDS = (10.0, 120.0)
"""A member that does not come to its leader is given up at once the first time. Where the next one does not come
either, and no step was made since, it is more likely the network between them than the pod: it has so long since the
loss before, doubled each time up to the second figure. So a budget of five lasts for minutes, not half of one."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A pod that is given up."""

    pod: str
    ordinal: int
    slot: int | None  # None: it held none
    node: str
    # PodLost, PodFailed, PodDeleted, NodeDrained, ContainerCrashLoop, NodeLost, NodeLeaving, NodeExcluded,
    # GpuUnhealthy, Straggler, PreflightFailed, PodRefused, LeaderLost, or the leader's word
    cause: str
    witness: str
    message: str = ""
    counts: bool = True  # against the budget and in status.faults


def lost(
    job: TrainingJob,
    status: TrainingJobStatus,
    observed: Observed,
    leaving: Mapping[str, Departure],
    *,
    heirs: bool,
    now: float,
) -> list[Loss]:
    """Pods to give up now, by slot, then by ordinal. ``heirs``: others are ready for the slots of all who leave."""
    by_name = {pod.name: pod for pod in observed.pods}
    found: list[Loss] = []
    for slot_text, name in sorted(status.slots.items(), key=lambda entry: int(entry[0])):
        pod = by_name.get(name)
        slot = int(slot_text)
        why = leaving.get(name)
        reason = _member_lost(job, status, observed, now, slot=slot, pod=pod, name=name, leaving=why, heirs=heirs)
        if reason:
            ordinal = pod.ordinal if pod else _ordinal(name)
            found.append(Loss(name, ordinal, slot, pod.node if pod else "", *reason))
    members = set(status.slots.values())
    for pod in sorted(current(observed.pods, status.incarnations).values(), key=lambda pod: pod.ordinal):
        if pod.name in members:
            continue
        if pod.unfit:
            found.append(Loss(pod.name, pod.ordinal, None, pod.node, UNFIT, "preflight", pod.unfit))
        elif pod.refused:
            if now >= refused_until(pod):
                reason = (REFUSED, "podStatus", pod.refused)
                found.append(Loss(pod.name, pod.ordinal, None, pod.node, *reason, counts=False))
        elif pod.ended:
            found.append(Loss(pod.name, pod.ordinal, None, pod.node, "PodFailed", "podStatus", _why_ended(pod)))
        elif pod.deleting:  # somebody's wish, not a fault; it held no slot
            reason = _deleted(pod, observed)
            found.append(Loss(pod.name, pod.ordinal, None, pod.node, *reason, counts=False))
        elif _node_down(pod, observed):
            found.append(Loss(pod.name, pod.ordinal, None, pod.node, "NodeLost", "nodeCondition", counts=False))
        elif (why := leaving.get(pod.name)) and settled(pod, now):
            reason = (why.cause, why.witness, why.why)
            found.append(Loss(pod.name, pod.ordinal, None, pod.node, *reason, counts=False))
        elif loops_for_slot(pod, status) and now >= looping_until(pod):
            found.append(Loss(pod.name, pod.ordinal, None, pod.node, "ContainerCrashLoop", "podStatus", pod.message))
    return found


def _member_lost(
    job: TrainingJob,
    status: TrainingJobStatus,
    observed: Observed,
    now: float,
    *,
    slot: int,
    pod: Pod | None,
    name: str,
    leaving: Departure | None,
    heirs: bool,
) -> tuple[str, str, str] | None:
    """(cause, witness, what more is known) if the member must be given up."""
    if pod is None:
        return None if name in observed.creating else ("PodLost", "podStatus", "")
    if pod.unfit and not pod.running:  # started again it may have passed, and hold its slot again by now
        return UNFIT, "preflight", pod.unfit
    if pod.ended:
        return "PodFailed", "podStatus", _why_ended(pod)
    if pod.deleting:
        return _deleted(pod, observed)
    if pod.waiting == "CrashLoopBackOff":
        return "ContainerCrashLoop", "podStatus", ""
    request = observed.leader.replace if observed.leader else None
    asked = request is not None and request.epoch == status.epoch and slot in request.slots
    if request and asked and (request.cause != "MemberLost" or now >= patient_until(status)):
        # The leader has seen two things itself: no stream, and no step for the time of grace.
        return request.cause, request.witness, ""
    stands = stalled(job, status, observed.leader, now)
    if _node_down(pod, observed) and stands:
        node = observed.nodes.get(pod.node)
        planned = node is not None and node.cordoned  # somebody works on it
        return "NodeDrained" if planned else "NodeLost", "nodeCondition", ""
    useless = stands and leaving is not None and leaving.cause == "GpuUnhealthy"  # it can't be waited for
    idle = stands and leaving is not None and leaving.presses  # a slow member is no reason to lose a step
    if leaving and (useless or (heirs and (idle or stopped(status, observed)))):
        return leaving.cause, leaving.witness, leaving.why
    if slot == 0 and (witness := leader_lost(job, pod, observed, now)):
        return "LeaderLost", witness, ""
    return None


def _deleted(pod: Pod, observed: Observed) -> tuple[str, str, str]:
    node = observed.nodes.get(pod.node)
    return "NodeDrained" if node and (node.cordoned or node.leaving) else "PodDeleted", "podStatus", pod.disruption


def refused_until(pod: Pod) -> float:
    """When a pod that its kubelet refused is given up for another."""
    return pod.created + REFUSED_SECONDS


def loops_for_slot(pod: Pod, status: TrainingJobStatus) -> bool:
    """Whether a pod that holds no slot keeps one vacant by its container's looping. A job that has never begun waits,
    ``startupDeadlineSeconds`` is there for who wants an end; and to one that trains a spare that loops does no harm."""
    return pod.waiting == "CrashLoopBackOff" and status.epoch > 0 and status.slot_map_hash is None


def looping_until(pod: Pod) -> float:
    """When a pod that loops for a vacant slot is given up for another."""
    return pod.created + LOOPING_SECONDS


def patient_until(status: TrainingJobStatus) -> float:
    """Until when a member that its leader misses is waited for: the losses in earlier epochs since the last step
    decide. Several at once are one."""
    since = takewhile(lambda fault: fault.steps_lost is None, reversed(status.faults))
    times = {
        one.epoch: unix(one.at)
        for one in since
        if one.cause == "MemberLost" and one.rung in POD_GIVEN_UP and one.epoch < status.epoch
    }
    if not times:
        return 0.0
    first, most = PATIENCE_SECONDS
    return max(times.values()) + min(most, first * 2.0 ** (len(times) - 1))


def _why_ended(pod: Pod) -> str:
    return ": ".join(filter(None, (pod.disruption, pod.message)))


def stopped(status: TrainingJobStatus, observed: Observed) -> bool:
    """The leader has said that this epoch's workers have ended."""
    said = observed.leader.finished if observed.leader else None
    return said is not None and said.term.epoch == status.epoch


def leader_lost(job: TrainingJob, pod: Pod, observed: Observed, now: float) -> str | None:
    """The witness beside the operator's own connection that tells that the leader is lost, if it is."""
    leader = observed.leader
    if leader is None or leader.pod_uid != pod.uid or leader.connected:
        return None
    silence = now - leader.since
    others = [
        agent.inventory
        for uid, agent in observed.agents.items()
        if uid != pod.uid and agent.inventory and agent.answered is not None and now - agent.answered < FRESH_ANSWER
    ]
    heard = [member.leader_silent for member in others if member.leader_silent is not None]
    if any(seconds < AGREED_SILENCE for seconds in heard):
        return None  # only the operator's own connection is broken
    if heard and silence >= max(LEAST_SILENCE, 2 * AGREED_SILENCE - min(heard)):
        return "stream"
    # One witness. An operator that reaches nobody blames its own network, unless there is nobody else to ask.
    alone = job.spec.nodes + job.spec.spares == 1
    if (others or alone) and silence >= job.spec.resilience.leader_deadline_seconds:
        return "heartbeat"
    return None


def stalled(job: TrainingJob, status: TrainingJobStatus, leader: Leader | None, now: float) -> bool:
    """Whether steps have stopped: a witness against any member, since a step takes all of them. An operator that has
    only begun to listen has heard nothing yet and is no witness."""
    if len(status.slots) < (status.elastic.nodes or job.spec.nodes):
        return True
    if leader is None:
        return False
    newest = leader.progress.newest if leader.progress else None
    last = leader.since if leader.advanced is None else leader.advanced
    return now - last >= max(AGREED_SILENCE, 3 * newest.seconds if newest else 0.0)


def may_force(job: TrainingJob, pod: Pod, observed: Observed, now: float) -> bool:
    """Whether the pod may be deleted without its kubelet's word: nobody is there to give it. A kubelet that was only
    away for a moment has some time to come back and end the pod in order."""
    if not _node_down(pod, observed):
        return False
    node = observed.nodes.get(pod.node)
    if node is None or node.out_of_service:
        return True
    return now >= (force_at(job, pod) or now + 1)


def force_at(job: TrainingJob, pod: Pod) -> float | None:
    """When the pod may be deleted by force if its node is not ready by then; None if nobody has deleted it yet."""
    wait = job.spec.resilience.nodes.force_delete_after_seconds
    return None if pod.deleted_at is None else pod.deleted_at + wait


def _node_down(pod: Pod, observed: Observed) -> bool:
    if not pod.node or not observed.nodes:
        return False
    node = observed.nodes.get(pod.node)
    return node is None or node.down


def _ordinal(pod_name: str) -> int:
    return int(pod_name.rsplit("-", 2)[1])
