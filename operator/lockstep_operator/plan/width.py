"""On how many nodes the job trains: on all, or on fewer while there is no room for them.

The numbers of nodes that a job can train on are ``lockstep_api.v1alpha1.widths``; here is when to change to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobSpec, TrainingJobStatus
from lockstep_api.v1alpha1.widths import largest, obstacle
from lockstep_operator.plan import slots
from lockstep_operator.plan.observed import Observed, Pod
from lockstep_operator.plan.times import rfc3339, unix

COMING_SECONDS = 600.0
"""So long after its creation a pod that has a node counts as coming: large images take minutes to pull. One that takes
longer has something else in its way."""
STARTING_UP = ("", "ContainerCreating", "PodInitializing")
"""Reasons to wait that pass by themselves."""


@dataclass(frozen=True, slots=True)
class Supply:
    """Pods of a job, by what they can do for it now."""

    held: int
    """Hold a slot."""
    free: int
    """Could take one now."""
    coming: int
    """Have a node, and are on their way up."""

    @property
    def have(self) -> int:
        """Could train now."""
        return self.held + self.free


def current(job: TrainingJob, status: TrainingJobStatus) -> int:
    """On how many nodes the current epoch trains, or the first one is to."""
    return status.elastic.nodes or job.spec.nodes


def supply(
    job: TrainingJob,
    status: TrainingJobStatus,
    pods: Mapping[int, Pod],
    observed: Observed,
    *,
    leaving: Set[str] = frozenset(),
    now: float,
) -> Supply:
    """``pods``: ordinal → the pod of the current incarnation; ``leaving``: names of those that must leave their nodes.
    These, and pods whose imports still load, take a vacant slot where nobody else does, and are no reason to grow:
    those that train would stand still meanwhile."""
    members = set(status.slots.values())
    others = [pod for pod in pods.values() if pod.name not in members]
    if len(members) >= current(job, status):
        others = [pod for pod in others if pod.name not in leaving and slots.warm(pod, observed.agents)]
    free = {pod.name for pod in others if may_take(pod, status, observed, now)}
    coming = [
        pod
        for pod in others
        if pod.name not in free
        and pod.node
        and not pod.ended
        and not pod.deleting
        and pod.waiting in STARTING_UP
        and now - pod.created < COMING_SECONDS
    ]
    return Supply(len(members), len(free), len(coming))


def may_take(pod: Pod, status: TrainingJobStatus, observed: Observed, now: float) -> bool:
    """Whether the pod could get a slot now. At the first start nobody has waited long; later it must prove that it is
    alive."""
    return slots.usable(pod, observed.agents) and (status.epoch == 0 or slots.fresh(pod, observed.agents, now))


def follow(job: TrainingJob, status: TrainingJobStatus, have: Supply, now: float) -> TrainingJobStatus:
    """Status with the times since when a slot waits for a pod, and since when there is room for more nodes."""
    width = current(job, status)
    short = have.held < width and have.have < width
    room = have.held == width < job.spec.nodes and (largest(job.spec, have.have) or 0) > width
    known = status.elastic
    times = {
        "short_since": (known.short_since or rfc3339(now)) if short else None,
        "room_since": (known.room_since or rfc3339(now)) if room else None,
    }
    return status.model_copy(update={"elastic": known.model_copy(update=times)})


def choose(
    spec: TrainingJobSpec, width: int, have: Supply, *, short: float | None = None, room: float | None = None
) -> int | None:
    """On how many nodes the job is to train next, None: it waits for pods. ``width``: on how many it does now;
    ``short``: seconds for which a slot has waited for a pod; ``room``: seconds for which more nodes could have trained.

    A vacant slot is filled rather than left out; the job goes on without it where no pod comes for too long.
    All nodes together are taken back at once; some of them, which costs a start more, when the others stay away.
    """
    if have.held < width:
        if have.have >= width:
            return width
        elastic = spec.resilience.elastic
        waited = elastic is not None and short is not None and short >= elastic.shrink_after_seconds
        return largest(spec, have.have) if waited and have.have + have.coming < width else None
    if width >= spec.nodes:
        return width
    elastic = spec.resilience.elastic
    more = largest(spec, have.have) or width
    patient = elastic is None or (room is not None and room >= elastic.shrink_after_seconds)
    return more if more >= spec.nodes or (more > width and patient) else width


def hopeless(job: TrainingJob, status: TrainingJobStatus, have: Supply, now: float) -> bool:
    """Whether the pods are to be let go: a slot has waited for too long, and the job can't train on what there is. A
    job that has never begun is not torn down again: it holds what a scheduler without gangs has given it so far."""
    since = status.elastic.short_since
    waited = since is not None and now - unix(since) >= job.spec.resilience.requeue_after_seconds
    return waited and status.epoch > 0 and largest(job.spec, have.have + have.coming) is None


def seconds_since(time: str | None, now: float) -> float | None:
    """Seconds since that RFC 3339 time."""
    return None if time is None else now - unix(time)


def next_look(job: TrainingJob, status: TrainingJobStatus, now: float) -> float | None:
    """When time alone may change the decision, Unix seconds."""
    known, resilience = status.elastic, job.spec.resilience
    times = []
    if known.short_since:
        times.append(unix(known.short_since) + resilience.requeue_after_seconds)
    if resilience.elastic:
        since = known.short_since or known.room_since
        times += [unix(since) + resilience.elastic.shrink_after_seconds] if since else []
    return min((time for time in times if time > now), default=None)


def prospect(job: TrainingJob, status: TrainingJobStatus, have: Supply) -> str:
    """What becomes of a job that waits for pods, in a sentence; empty where there is nothing to say."""
    since, resilience = status.elastic.short_since, job.spec.resilience
    if since is None or status.epoch == 0 or len(status.slots) == job.spec.nodes:
        return ""
    fewer = largest(job.spec, have.have)
    if resilience.elastic and fewer is not None:
        when = rfc3339(unix(since) + resilience.elastic.shrink_after_seconds)
        return f"If no pod comes, training goes on with {fewer} of {job.spec.nodes} nodes from {when} on."
    why = ""
    if resilience.elastic:
        fewest = resilience.elastic.min_nodes
        reason = obstacle(job.spec, have.have) if have.have >= fewest else None
        why = (
            f"No number of nodes from minNodes {fewest} to the {have.have} that are there fits: {reason}. "
            if reason
            else f"{have.have} nodes are there, and resilience.elastic.minNodes is {fewest}. "
        )
    when = rfc3339(unix(since) + resilience.requeue_after_seconds)
    return f"{why}If no pod comes, all pods are let go at {when}, and the job begins again later."
