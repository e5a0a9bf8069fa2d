"""Which nodes one job's new pods stay away from because of its own faults."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep_api.v1alpha1 import ExcludedNode, Fault, TrainingJob, TrainingJobStatus, Verdict
from lockstep_operator.plan.actions import Event
from lockstep_operator.plan.nodes.exclusion import allowance
from lockstep_operator.plan.observed import Observed
from lockstep_operator.plan.times import rfc3339, unix

AVOID_SECONDS = 600.0
"""How long new pods prefer other nodes than one that was lost: until the cluster has surely noticed by itself."""
NAMING = frozenset({"GpuUnhealthy", "PreflightFailed", "Corruption", "Straggler"})
"""Causes that name a node by themselves; of others a rule of ``resilience.retry`` can say it."""
SUSPECTED = "CorruptionSuspected"
"""One of several pods computes wrong numbers, and this one was put aside to see whether it is that one: see the
trainer's ``protocol.dispute``. Until it is known, no pod of the job comes to its node."""
BREAKER_SHARE = 0.02
"""Of a job's nodes, which may be excluded in an hour whatever the number: of many hosts 1 to 2 % are always unfit."""
_WRONG_NUMBERS = frozenset({SUSPECTED, "Corruption"})
_BLAMELESS = frozenset({"PodDeleted", "NodeDrained", "NodeLeaving", "NodeExcluded", "ContainerCrashLoop"})


def names_node(fault: Fault) -> bool:
    """Whether the fault says that its node is to blame."""
    return bool(fault.node) and (fault.blame == "Named" or fault.cause in NAMING)


def locate(status: TrainingJobStatus) -> TrainingJobStatus:
    """Status in which a suspicion has come true: without that pod ranks agree, says a verdict on its node."""
    faults = [_located(fault, status.verdicts) for fault in status.faults]
    return status if faults == status.faults else status.model_copy(update={"faults": faults})


def _located(fault: Fault, verdicts: Sequence[Verdict]) -> Fault:
    if fault.cause != SUSPECTED:
        return fault
    for one in verdicts:
        named = one.kind == "Corrupt" and one.cause == "Permanent" and fault.node in one.nodes
        if named and unix(one.at) >= unix(fault.at):
            return fault.model_copy(update={"cause": "Corruption", "message": one.evidence})
    return fault


def _suspected(fault: Fault, faults: Sequence[Fault]) -> bool:
    """Whether its pod is put aside on suspicion, and not cleared yet: ranks have not disagreed again without it."""
    return fault.cause == SUSPECTED and bool(fault.node) and not _disagreed_since(fault.at, faults)


def _disagreed_since(at: str, faults: Sequence[Fault]) -> bool:
    return any(one.cause in _WRONG_NUMBERS and unix(one.at) > unix(at) for one in faults)


def breaker(job: TrainingJob) -> tuple[int, str]:
    """(how many nodes the job may exclude in an hour, what says so)."""
    number, share = job.spec.resilience.nodes.exclude_per_hour, int(BREAKER_SHARE * job.spec.nodes)
    if number and share > number:
        return share, f"{100 * BREAKER_SHARE:.0f} % of the job's nodes ({share})"
    return number, f"resilience.nodes.excludePerHour ({number}) nodes"


def exclude(job: TrainingJob, status: TrainingJobStatus, now: float) -> tuple[TrainingJobStatus, tuple[Event, ...]]:
    """Status with the nodes excluded that its faults name, as far as the breaker lets them, and the events of it."""
    rules, (most, as_said) = job.spec.resilience.nodes, breaker(job)
    valid = [one for one in status.excluded_nodes if now < unix(one.until)]
    kept = [settled for one in valid if (settled := _settled(one, status.faults))]
    known = {one.node for one in kept}
    seen = {(fault.at, fault.pod) for fault in job.status.faults}
    events = [
        Event(
            "Normal", "NodeReleased", f"Pods of this job may come to {one.node} again: ranks disagree without it too."
        )
        for one in valid
        if one.node not in known
    ]
    for fault in status.faults:
        until = unix(fault.at) + rules.exclude_seconds
        named = names_node(fault) or _suspected(fault, status.faults)
        if not named or fault.node is None or fault.node in known or now >= until:
            continue
        if allowance((unix(one.since) for one in kept), now, most):
            kept.append(ExcludedNode(node=fault.node, since=fault.at, until=rfc3339(until), reason=fault.cause))
            known.add(fault.node)
            text = f"New pods of this job stay away from {fault.node} until {rfc3339(until)}: {fault.cause}."
            events.append(Event("Warning", "NodeExcluded", text))
        elif (fault.at, fault.pod) not in seen:
            text = (
                f"{fault.node} is not excluded after {fault.cause}: {as_said} were in the last hour. So many point to "
                "something that they share, or to the program."
            )
            events.append(Event("Warning", "NodeExclusionHeld", text))
    if kept != status.excluded_nodes:
        status = status.model_copy(update={"excluded_nodes": kept})
    return status, tuple(events)


def _settled(one: ExcludedNode, faults: Sequence[Fault]) -> ExcludedNode | None:
    """The exclusion as it is now: one on suspicion becomes one for good, or ends."""
    if one.reason != SUSPECTED:
        return one
    if any((fault.cause, fault.node, fault.at) == ("Corruption", one.node, one.since) for fault in faults):
        return one.model_copy(update={"reason": "Corruption"})
    return None if _disagreed_since(one.since, faults) else one


def excluded(status: TrainingJobStatus, observed: Observed) -> tuple[str, ...]:
    """Nodes that no new pod of the job may go to: its own, and those that all jobs stay away from."""
    return tuple(sorted({one.node for one in status.excluded_nodes} | observed.excluded))


def avoided(status: TrainingJobStatus, observed: Observed, now: float) -> tuple[str, ...]:
    """Nodes that new pods go to only if there are no others: lately lost, about to go, or found at fault by another
    system; and where a kubelet has just refused one."""
    lost = {
        fault.node
        for fault in status.faults
        if fault.node
        and fault.rung in ("pod", "spare", "shrink", "requeue")
        and fault.cause not in _BLAMELESS
        and now - unix(fault.at) < AVOID_SECONDS
    }
    lost |= {pod.node for pod in observed.pods if pod.refused}
    suspected = {node.name for node in observed.nodes.values() if node.leaving or node.sick}
    return tuple(sorted((lost | suspected) - set(excluded(status, observed))))
