"""Changing the number of nodes that train: what is asked of the leader before, and what the status says of it.

Another number of nodes begins from the store, since shards in memory are of the old one; what only memory has, the new
leader has brought there first. Before more nodes train, or all pods are let go, the leader stops with a last
checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_api import constants
from lockstep_api.messages import Stop
from lockstep_api.v1alpha1 import ElasticStatus, Phase, TrainingJob, TrainingJobStatus
from lockstep_operator.plan import faults, lifecycle, losses, width
from lockstep_operator.plan.observed import Observed
from lockstep_operator.plan.status import find_condition


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done about the number of nodes."""

    nodes: int | None
    """So many train in the next epoch, or go on; None: the job waits for pods."""
    stop: Stop | None = None
    """To be told to the leader before."""
    requeue: bool = False
    """All pods are let go."""


def decide(
    job: TrainingJob,
    status: TrainingJobStatus,
    have: width.Supply,
    observed: Observed,
    *,
    leads: bool,
    moving: bool,
    now: float,
) -> Decision:
    """On how many nodes the job is to go on, and what comes before. ``moving``: a member is about to leave its node,
    which comes first."""
    now_on, saves = width.current(job, status), job.spec.checkpoint is not None
    stopped = losses.stopped(status, observed)
    if width.hopeless(job, status, have, now):
        waited = width.seconds_since(status.elastic.short_since, now) or 0.0
        late = waited >= job.spec.resilience.requeue_after_seconds + lifecycle.STOP_SECONDS
        if not saves or not leads or stopped or late:
            return Decision(None, requeue=True)
        return Decision(None, _stop(job, status, "there is no room for enough pods"))
    nodes = width.choose(
        job.spec,
        now_on,
        have,
        short=width.seconds_since(status.elastic.short_since, now),
        room=width.seconds_since(status.elastic.room_since, now),
    )
    if nodes is None or not status.slots or nodes <= now_on or stopped:
        return Decision(nodes)
    degraded = find_condition(status, constants.CONDITION_CHECKPOINT_DEGRADED)
    done = status.progress.steps is not None and status.progress.step >= status.progress.steps
    if done or moving or not leads or status.phase != Phase.RUNNING or (degraded and degraded.status == "True"):
        return Decision(now_on)  # it is not the time to interrupt it
    return Decision(now_on, _stop(job, status, f"{nodes} nodes can train")) if saves else Decision(nodes)


def _stop(job: TrainingJob, status: TrainingJobStatus, reason: str) -> Stop:
    return Stop(job.uid, status.epoch, reason, seconds=lifecycle.FINAL_CHECKPOINT_SECONDS)


def resized(job: TrainingJob, status: TrainingJobStatus, nodes: int) -> TrainingJobStatus:
    """Status of a new epoch on so many nodes."""
    restarts, known = status.restarts, status.elastic
    if status.epoch and nodes < width.current(job, status):
        restarts = restarts.model_copy(update={"shrink": restarts.shrink + 1, "total": restarts.total + 1})
        status = status.model_copy(update={"faults": faults.went_to(status.faults, "shrink")})
    fresh = ElasticStatus(nodes=nodes, requeued_at=known.requeued_at)
    return status.model_copy(update={"restarts": restarts, "elastic": fresh})


def cause(job: TrainingJob, before: int, nodes: int) -> str:
    """Why the new epoch has another number of nodes."""
    if nodes < before:
        return f"{nodes} of {job.spec.nodes} nodes go on: there is no room for more"
    return f"{nodes} of {job.spec.nodes} nodes go on, {before} before: there is room again"
