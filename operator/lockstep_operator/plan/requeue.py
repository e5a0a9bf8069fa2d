"""Letting all pods go for want of room, and beginning again later, from the newest checkpoint."""

from __future__ import annotations

from lockstep_api import constants
from lockstep_api.v1alpha1 import ElasticStatus, Phase, TrainingJob, TrainingJobStatus
from lockstep_operator.plan import faults, lifecycle
from lockstep_operator.plan.actions import Event, Plan
from lockstep_operator.plan.observed import Observed
from lockstep_operator.plan.status import set_condition
from lockstep_operator.plan.times import rfc3339, unix

PAUSE_SECONDS = (60.0, 900.0)
"""Before the pods of a job that was requeued are created again: doubled each time, up to the second. Whoever needs less
room gets it first, and a cluster that stays full is not asked without end."""


def until(status: TrainingJobStatus) -> float | None:
    """Unix seconds up to which a requeued job has no pods."""
    at = status.elastic.requeued_at
    if at is None or status.slots or status.elastic.nodes:
        return None
    first, longest = PAUSE_SECONDS
    return unix(at) + min(longest, first * 2.0 ** max(0, status.budgets_used.requeue - 1))


def waiting(job: TrainingJob, status: TrainingJobStatus, observed: Observed, now: float) -> Plan | None:
    """The plan of a job whose pods were let go, until they are to be created again; None for another job."""
    end = until(status)
    if end is None or now >= end:
        return None
    status = _said(job, status.model_copy(update={"phase": Phase.PENDING}), end, now)
    return Plan(
        status=status,
        delete=lifecycle.delete_all(job, observed, "There is no room for all pods of the job", now),
        again_at=end,
    )


def begin(job: TrainingJob, status: TrainingJobStatus, observed: Observed, now: float) -> Plan:
    """Let all pods go; past the budget the job fails."""
    status = lifecycle.let_go(job, status, observed)
    used = status.budgets_used.requeue + 1
    status = status.model_copy(
        update={
            "phase": Phase.PENDING,
            "elastic": ElasticStatus(requeued_at=rfc3339(now)),
            "budgets_used": status.budgets_used.model_copy(update={"requeue": used}),
            "restarts": status.restarts.model_copy(
                update={"requeue": status.restarts.requeue + 1, "total": status.restarts.total + 1}
            ),
            "faults": faults.went_to(status.faults, "requeue"),
        }
    )
    budget = job.spec.resilience.budgets.requeue
    if used > budget:
        text = (
            f"For the {used}th time since the last durable checkpoint there was no room for enough pods for "
            f"{job.spec.resilience.requeue_after_seconds:g} s; resilience.budgets.requeue is {budget}."
        )
        return lifecycle.finish(job, status, observed, lifecycle.Ending(False, "RequeueBudgetExceeded", text), now)
    end = until(status)
    assert end is not None
    status = _said(job, status, end, now)
    where = f" Training stands at step {status.step}." if status.step else ""
    text = f"No room for enough pods for {job.spec.resilience.requeue_after_seconds:g} s: all are let go.{where}"
    return Plan(status=status, events=(Event("Warning", "Requeued", text),), again_at=now)


def _said(job: TrainingJob, status: TrainingJobStatus, end: float, now: float) -> TrainingJobStatus:
    message = (
        f"There was no room for enough pods; they are created again at {rfc3339(end)}, from the newest checkpoint."
    )
    kind = constants.CONDITION_READY
    return set_condition(status, job, kind, "False", reason="Requeued", message=message, now=now)
