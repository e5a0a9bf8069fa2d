"""Beginning, suspension and end of a job."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_api import constants
from lockstep_api.messages import Stop
from lockstep_api.v1alpha1 import ElasticStatus, Members, Phase, TrainingJob, TrainingJobStatus
from lockstep_operator.plan import ledger, losses
from lockstep_operator.plan.actions import DeletePod, Event, Plan
from lockstep_operator.plan.observed import Observed
from lockstep_operator.plan.pool import bump, current
from lockstep_operator.plan.status import explain, find_condition, set_condition
from lockstep_operator.plan.times import rfc3339, unix

FINAL_CHECKPOINT_SECONDS = 120.0
"""What a suspended job, or one past its deadline, may take to bring its newest state to the store; where that is away,
it has the one before."""
STOP_SECONDS = FINAL_CHECKPOINT_SECONDS + 30.0
"""How long a suspended job's leader may take to end its workers before its pods are deleted anyway."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a job ends now."""

    succeeded: bool
    reason: str
    message: str


def begin(job: TrainingJob, now: float) -> TrainingJobStatus:
    """The status as this plan starts from it: times set, resumption noticed."""
    status = job.status
    update: dict[str, object] = {"observed_generation": job.generation}
    if status.start_time is None:
        update["start_time"] = rfc3339(now)
    if status.phase is None:
        update["phase"] = Phase.PENDING
    if not job.spec.suspend:
        if status.active_since is None:
            update["active_since"] = rfc3339(now)
        if status.phase in (Phase.SUSPENDED, Phase.SUSPENDING):
            update["phase"] = Phase.PENDING
    status = status.model_copy(update=update)
    if not job.spec.suspend and find_condition(status, constants.CONDITION_SUSPENDED):
        status = set_condition(
            status,
            job,
            constants.CONDITION_SUSPENDED,
            "False",
            reason="Resumed",
            message="spec.suspend is false.",
            now=now,
        )
    return status


def active_seconds(status: TrainingJobStatus, now: float) -> float:
    """Seconds that the job was not suspended."""
    return status.active_seconds + (now - unix(status.active_since) if status.active_since else 0.0)


def deadline(job: TrainingJob, status: TrainingJobStatus, now: float) -> float | None:
    """When activeDeadlineSeconds will have passed."""
    limit = job.spec.active_deadline_seconds
    return None if limit is None or job.spec.suspend else now + limit - active_seconds(status, now)


def startup_deadline(job: TrainingJob, status: TrainingJobStatus) -> float | None:
    """When startupDeadlineSeconds will have passed; None if the job runs already, or may wait. A job is in these phases
    until its first step since it was started or resumed; neither a recovery nor what follows a requeue is a start."""
    limit = job.spec.startup_deadline_seconds
    if limit is None or job.spec.suspend or not status.active_since or status.elastic.requeued_at:
        return None  # a job that was requeued has started before
    return unix(status.active_since) + limit if status.phase in (Phase.PENDING, Phase.STARTING) else None


def last_checkpoint(
    job: TrainingJob, status: TrainingJobStatus, observed: Observed, leads: bool, now: float
) -> Plan | None:
    """Past activeDeadlineSeconds: ask the leader to stop with a last checkpoint, as long as it may take; then None."""
    limit = deadline(job, status, now)
    if limit is None or now < limit or job.spec.checkpoint is None or not status.slots or not leads:
        return None
    latest = limit + FINAL_CHECKPOINT_SECONDS
    if now >= latest or losses.stopped(status, observed):
        return None
    stop = Stop(job.uid, status.epoch, "activeDeadlineSeconds have passed", seconds=FINAL_CHECKPOINT_SECONDS)
    return Plan(status=status, send=(stop,), again_at=latest)


def ending(job: TrainingJob, status: TrainingJobStatus, observed: Observed, leads: bool, now: float) -> Ending | None:
    """Whether the job ends now; behind its deadline it does, unless ``last_checkpoint`` has something to wait for."""
    said = observed.leader.finished if observed.leader else None
    if said and said.term.epoch == status.epoch and said.outcome != "stopped":
        return Ending(said.outcome == "succeeded", said.reason, said.message)
    limit = deadline(job, status, now)
    if limit is not None and now >= limit:
        return Ending(
            False,
            "DeadlineExceeded",
            f"The job was active for {job.spec.active_deadline_seconds} s, its activeDeadlineSeconds.",
        )
    started_by = startup_deadline(job, status)
    heard = observed.leader.progress if leads and observed.leader else None
    if started_by is not None and now >= started_by and not (heard and heard.state in ("running", "finishing")):
        pods = sorted(current(observed.pods, status.incarnations).values(), key=lambda pod: pod.ordinal)
        _, waits = explain(status, job, pods, observed)
        return Ending(
            False,
            "StartupDeadlineExceeded",
            f"No step was finished within {job.spec.startup_deadline_seconds} s, the job's startupDeadlineSeconds. "
            f"It was waiting for this: {waits.removesuffix('.')}.",
        )
    if observed.refusal and observed.refusal.final:
        # The template can't be changed, so trying again can't help.
        text = observed.refusal.sentence.removesuffix(".")
        return Ending(False, "InvalidTemplate", f"{text}. Correct spec.template in a new job.")
    return None


def overspent(job: TrainingJob, status: TrainingJobStatus) -> Ending | None:
    """Whether more was lost since the last durable checkpoint than the budget allows."""
    used, budget = status.budgets_used.pod, job.spec.resilience.budgets.pod
    if used <= budget:
        return None
    last = status.faults[-1] if status.faults else None
    what = f": {last.message.removesuffix('.')}" if last and last.message else ""
    where = f" The last: {last.pod} on {last.node or 'no node'}, {last.cause}{what}." if last else ""
    return Ending(
        False,
        "PodBudgetExceeded",
        f"{used} pods were lost or given up since the last durable checkpoint, those of one moment counted as one; "
        f"resilience.budgets.pod is {budget}.{where}",
    )


def finish(job: TrainingJob, status: TrainingJobStatus, observed: Observed, ending_: Ending, now: float) -> Plan:
    """The status of the end. Pods are deleted by the plans that follow."""
    kind = constants.CONDITION_SUCCEEDED if ending_.succeeded else constants.CONDITION_FAILED
    status = ledger.close_epoch(status)
    status = set_condition(status, job, kind, "True", reason=ending_.reason, message=ending_.message, now=now)
    status = set_condition(
        status, job, constants.CONDITION_READY, "False", reason=ending_.reason, message=ending_.message, now=now
    )
    degraded = constants.CONDITION_CHECKPOINT_DEGRADED
    if ending_.succeeded and find_condition(status, degraded):  # it may have waited for the store with its last step
        text = "The last checkpoint is durable."
        status = set_condition(status, job, degraded, "False", reason=ending_.reason, message=text, now=now)
    status = status.model_copy(
        update={
            "phase": Phase.SUCCEEDED if ending_.succeeded else Phase.FAILED,
            "completion_time": rfc3339(now),
            "active_seconds": active_seconds(status, now),
            "active_since": None,
            "members": Members(),
            "ready": f"0/{job.spec.nodes}",
        }
    )
    event = Event("Normal" if ending_.succeeded else "Warning", ending_.reason, ending_.message)
    return Plan(status=status, events=(event,), again_at=now)


def after_end(job: TrainingJob, observed: Observed, now: float) -> Plan:
    """A job that has ended stays ended: its pods go, and after its TTL it goes itself."""
    status = job.status
    expires = None
    if job.spec.ttl_seconds_after_finished is not None and status.completion_time:
        expires = unix(status.completion_time) + job.spec.ttl_seconds_after_finished
    return Plan(
        status=status,
        delete=delete_all(job, observed, "The job has ended", now),
        delete_job=expires is not None and now >= expires,
        again_at=expires,
    )


def suspend(job: TrainingJob, status: TrainingJobStatus, observed: Observed, leads: bool, now: float) -> Plan:
    """Ask the leader to stop, then give up the pods; Suspended when none is left."""
    kind = constants.CONDITION_SUSPENDED
    condition = find_condition(status, kind)
    if condition is None or condition.status == "False":  # Unknown while it is under way: the time tells since when
        status = set_condition(
            status, job, kind, "Unknown", reason="Suspending", message="The workers end, then the pods.", now=now
        )
        condition = find_condition(status, kind)
    assert condition is not None
    since = unix(condition.last_transition_time)

    if not observed.pods:
        status = _suspended(job, status, now)
        return Plan(status=status, events=_suspended_event(job, status))
    status = status.model_copy(update={"phase": Phase.SUSPENDING})
    if status.slots and leads and not losses.stopped(status, observed) and now < since + STOP_SECONDS:
        stop = Stop(job.uid, status.epoch, constants.STOP_SUSPENDED, seconds=FINAL_CHECKPOINT_SECONDS)
        return Plan(status=status, send=(stop,), again_at=since + STOP_SECONDS)
    status = let_go(job, status, observed).model_copy(update={"elastic": ElasticStatus()})
    return Plan(status=status, delete=delete_all(job, observed, "The job is suspended", now), again_at=now + 2)


def let_go(job: TrainingJob, status: TrainingJobStatus, observed: Observed) -> TrainingJobStatus:
    """Status of a job that has given up its slots, and the names of its pods."""
    return ledger.close_epoch(status).model_copy(
        update={
            "slots": {},
            "slot_map_hash": None,
            "incarnations": bump(status.incarnations, _unbumped(status, observed)),
            "members": Members(),
            "ready": f"0/{job.spec.nodes}",
        }
    )


def delete_all(job: TrainingJob, observed: Observed, reason: str, now: float) -> tuple[DeletePod, ...]:
    """Every pod; by force where its node is down."""
    return tuple(
        DeletePod(pod.name, pod.uid, losses.may_force(job, pod, observed, now), reason)
        for pod in observed.pods
        if not pod.deleting or losses.may_force(job, pod, observed, now)
    )


def _unbumped(status: TrainingJobStatus, observed: Observed) -> set[int]:
    return {pod.ordinal for pod in observed.pods if pod.incarnation == status.incarnations.get(str(pod.ordinal), 0)}


def _suspended(job: TrainingJob, status: TrainingJobStatus, now: float) -> TrainingJobStatus:
    kind = constants.CONDITION_SUSPENDED
    status = set_condition(
        status, job, kind, "True", reason="Suspended", message="spec.suspend is true; no pod is left.", now=now
    )
    status = set_condition(
        status, job, constants.CONDITION_READY, "False", reason="Suspended", message="spec.suspend is true.", now=now
    )
    return status.model_copy(
        update={
            "phase": Phase.SUSPENDED,
            "active_seconds": active_seconds(status, now),
            "active_since": None,
            "members": Members(),
            "ready": f"0/{job.spec.nodes}",
            "slots": {},
            "slot_map_hash": None,
            "elastic": ElasticStatus(),
        }
    )


def _suspended_event(job: TrainingJob, status: TrainingJobStatus) -> tuple[Event, ...]:
    if job.status.phase == Phase.SUSPENDED:
        return ()
    where = f" at step {status.step}" if status.step else ""
    return (Event("Normal", "Suspended", f"No pod is left; training stands{where}."),)
