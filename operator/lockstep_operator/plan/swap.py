"""A member whose node's hardware is slow is moved to another one (``resilience.stragglers.action: Swap``).

The leader's verdict is confirmed by a measurement of the device before it gets here. Still it may be wrong, and each
move costs the time of a restart: so one node at a time, no more than ``swapsPerHour``, none while most of the job's
nodes are called slow, and none that costs more than it can gain. How a member leaves: ``departures``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lockstep_api import constants
from lockstep_api.v1alpha1 import StragglerAction, TrainingJob, TrainingJobStatus
from lockstep_operator.plan import story
from lockstep_operator.plan.actions import Event
from lockstep_operator.plan.nodes import jobwide
from lockstep_operator.plan.nodes.exclusion import HOUR, allowance
from lockstep_operator.plan.observed import Observed, Pod
from lockstep_operator.plan.pool import current
from lockstep_operator.plan.status import end_condition, find_condition, set_condition
from lockstep_operator.plan.times import unix

CAUSE = "Straggler"
"""Of the fault that a move is recorded as, and of the node's exclusion."""
HARDWARE = frozenset({"Clock", "Memory", "Compute", "Host"})
"""Causes that another node helps against: those of ``stragglers.work.Cause.blames_node`` of the trainer without
Network. A host that lacks CPU is late at both ends of an exchange, and so a sound rank's links were called slow."""
RESTART_SECONDS = 60.0
"""What a move is taken to cost: one restart of a large job. ``elastic.shrinkAfterSeconds`` is twice that, for two."""
ROOM_SECONDS = 60.0
"""A pod without a node for so long has found no room."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The member whose slow node is to be left next, or why none is."""

    pod: str
    node: str
    why: str
    """Who is slow, by how much and why."""
    held: str = ""
    """Reason of the condition, where the node is not left."""
    message: str = ""


def choose(job: TrainingJob, status: TrainingJobStatus, observed: Observed, now: float) -> Choice | None:
    """The oldest verdict that stands and blames the node of a member. None: there is none, or nothing is to be done
    about it. A verdict on a node that was left since, or on a slot's former node, is no reason, nor is one that names
    none: a host that its container's CPU limit holds up."""
    found = _blamed(job, status, observed)
    if found is None:
        return None
    pod, why, cost = found
    held, message = "", ""
    if not _stopped(status, observed):  # once it has, going on as before costs the restart too
        held, message = _held(job, status, observed, node=pod.node, cost=cost, now=now)
    return Choice(pod.name, pod.node, why, held, message)


def _blamed(job: TrainingJob, status: TrainingJobStatus, observed: Observed) -> tuple[Pod, str, float] | None:
    """(member, what is said of it, share of the job's time that it costs)."""
    if job.spec.resilience.stragglers.action is not StragglerAction.SWAP:
        return None
    pods = {pod.name: pod for pod in observed.pods}
    standing = [one for one in status.verdicts if _speaks_of_hardware(one.kind, one.cause) and one.ended is None]
    for verdict in sorted(standing, key=lambda one: (unix(one.at), one.ranks)):
        for slot in sorted({rank // job.spec.gpus_per_node for rank in verdict.ranks}):
            pod = pods.get(status.slots.get(str(slot), ""))
            if pod and pod.node in verdict.nodes and not _left_since(status, pod.node, verdict.at):
                return pod, story.verdict(verdict), verdict.cost
    return None


def _held(
    job: TrainingJob, status: TrainingJobStatus, observed: Observed, *, node: str, cost: float, now: float
) -> tuple[str, str]:
    """(reason, sentence) why the node is not left; empty where it may be."""
    rules, (most, as_said) = job.spec.resilience.stragglers, jobwide.breaker(job)
    named = _named_lately(status, now)
    if len(named) > 1 and 2 * len(named) > len(status.slots):
        return "ManySlowNodes", (
            f"{len(named)} nodes were called slow in the last hour, most of the {len(status.slots)} that train: that "
            "points to something that they share, or to the program"
        )
    left = _left(status)
    if not allowance((at for _, at in left), now, rules.swaps_per_hour):
        return "SwapLimit", (
            f"resilience.stragglers.swapsPerHour ({rules.swaps_per_hour}) nodes were left in the last hour"
        )
    known = {one.node for one in status.excluded_nodes}
    if node not in known and not allowance((unix(one.since) for one in status.excluded_nodes), now, most):
        return "SwapLimit", (f"{as_said} were excluded in the last hour: nothing would keep the next pod away from it")
    usable = [one.name for one in observed.nodes.values() if not one.down and not one.cordoned]
    if observed.nodes and not set(usable) - {node} - known - observed.excluded:
        return "NoRoom", "there is no other node that could be used"
    store = find_condition(status, constants.CONDITION_CHECKPOINT_DEGRADED)
    if store and store.status == "True":
        return "StoreUnavailable", "states can't be brought to the store at the moment"
    said = observed.leader.progress if observed.leader else None
    newest, steps = (said.newest, status.progress.steps) if said else (None, None)
    if newest and steps is not None and max(0, steps - newest.step) * newest.seconds * cost < RESTART_SECONDS:
        return "NotWorthIt", f"a restart, some {RESTART_SECONDS:.0f} s, costs more than the rest of the run would gain"
    return "", ""


def _speaks_of_hardware(kind: str, cause: str) -> bool:
    return kind == "Slow" and cause in HARDWARE


def _left(status: TrainingJobStatus) -> set[tuple[str, float]]:
    """(node, when it was left), as far as the status remembers: the last faults, and what is still excluded."""
    faults = {(one.node or "", unix(one.at)) for one in status.faults if one.cause == CAUSE}
    return faults | {(one.node, unix(one.since)) for one in status.excluded_nodes if one.reason == CAUSE}


def _left_since(status: TrainingJobStatus, node: str, at: str) -> bool:
    """One verdict is one move, whatever node the next pod comes to."""
    return any(name == node and when >= unix(at) for name, when in _left(status))


def _named_lately(status: TrainingJobStatus, now: float) -> set[str]:
    """Nodes that verdicts have blamed within an hour, those that are over among them."""
    found = {node for node, at in _left(status) if now - at < HOUR}
    for verdict in status.verdicts:
        if _speaks_of_hardware(verdict.kind, verdict.cause) and now - unix(verdict.at) < HOUR:
            found |= set(verdict.nodes)
    return found


def _stopped(status: TrainingJobStatus, observed: Observed) -> bool:
    said = observed.leader.finished if observed.leader else None
    return said is not None and said.term.epoch == status.epoch


# ---------------------------------------------------------------------------------------- what is said about it


def follow(
    status: TrainingJobStatus, job: TrainingJob, observed: Observed, *, leaving: Iterable[str], ready: bool, now: float
) -> TrainingJobStatus:
    """Status with the condition SlowNode. ``leaving``: pods that are to leave their node; ``ready``: others could take
    all of their slots at once."""
    kind, choice = constants.CONDITION_SLOW_NODE, choose(job, status, observed, now)
    if choice is None:
        text = "No member's node is known to be slow."
        return end_condition(status, job, kind, reason="NoSlowNode", message=text, now=now)
    reason, what = choice.held, choice.message
    if not reason and choice.pod not in leaving:
        reason, what = "OthersFirst", "another member leaves its node first"
    elif not reason and ready:
        reason, what = "Moving", "its slot moves to another pod behind the next step whose state is kept"
    elif not reason:
        reason, what = _preparing(status, observed, now)
    message = f"{choice.pod} on {choice.node} is slow{' and stays there' if _stays(reason) else ''}: {what}."
    return set_condition(status, job, kind, "True", reason=reason, message=message, now=now)


def _preparing(status: TrainingJobStatus, observed: Observed, now: float) -> tuple[str, str]:
    """(reason, sentence) while no other pod is ready."""
    members = set(status.slots.values())
    others = [pod for pod in current(observed.pods, status.incarnations).values() if pod.name not in members]
    waiting = [pod for pod in others if not pod.node and now - pod.created >= ROOM_SECONDS]
    if observed.refusal:
        return "NoRoom", f"a pod elsewhere was refused: {observed.refusal.message}"
    if waiting and len(waiting) == len(others):
        return "NoRoom", f"there is no room for another pod ({waiting[0].message or 'it waits for the scheduler'})"
    return "PodStarting", "another pod is made ready first"


def _stays(reason: str) -> bool:
    return reason not in ("OthersFirst", "Moving", "PodStarting")


def events(before: TrainingJobStatus, after: TrainingJobStatus) -> tuple[Event, ...]:
    """That a slow node is not left, and why, once: the condition has it as long as it is so."""
    kind = constants.CONDITION_SLOW_NODE
    old, new = find_condition(before, kind), find_condition(after, kind)
    if new is None or new.status != "True" or not _stays(new.reason) or (old and old.reason == new.reason):
        return ()
    return (Event("Warning", "SlowNodeKept", new.message),)
