"""``lockstep why``: what a job is doing and why, in sentences. A pure function of the job and the time."""

from __future__ import annotations

from lockstep_api import constants
from lockstep_api.v1alpha1 import Condition, Phase, TrainingJob, TrainingJobStatus
from lockstep_cli import times
from lockstep_operator.plan.story import describe, injected, sentence, verdict


def why(job: TrainingJob, now: float, *, local: bool = False) -> str:
    """One line or more, the most important first. ``local``: it is the job of a `lockstep run`."""
    sentences = [
        _phase(job, now, local),
        *_conditions(job),
        *_other_data(job),
        *_verdicts(job),
        *_injected(job, now),
        *_last_fault(job, now),
    ]
    sentences += [*_excluded(job, now), *_budgets(job)]
    return " ".join(sentence for sentence in sentences if sentence)


def failure(status: TrainingJobStatus) -> str:
    """Why the job has failed; empty where it has not."""
    conditions = (one for one in status.conditions if one.type == constants.CONDITION_FAILED and one.status == "True")
    return next((one.message for one in conditions), "")


def _phase(job: TrainingJob, now: float, local: bool) -> str:
    status, spec = job.status, job.spec
    progress = status.progress
    seen = f"{times.ago(now - times.parse(progress.at))} ago: step {progress.step}." if progress.at else ""
    members = f"{status.members.ready} of {status.elastic.nodes or spec.nodes} members are ready"
    match status.phase:
        case None:
            return _unseen(job, local)
        case Phase.PENDING:
            return f"Pending: {members}, {status.members.starting} pods are not up yet."
        case Phase.STARTING:
            return f"Starting: {members}; the first step has not been done."
        case Phase.RUNNING:
            if spec.checkpoint and progress.steps and progress.step >= progress.steps:
                return f"Running: all {progress.steps} steps are done; its last checkpoint is not yet in the store."
            return f"Running. {seen}".strip()
        case Phase.RECOVERING:
            return f"Recovering: {members}. {seen}".strip()
        case Phase.SUSPENDING:
            return "Suspending: spec.suspend is true, the pods are being deleted."
        case Phase.SUSPENDED:
            return f"Suspended by spec.suspend. {_durable(job)}"
        case Phase.SUCCEEDED:
            return f"Succeeded after {_length(job)}{_done(job)}{_loss(job)}."
        case Phase.FAILED:
            return f"Failed after {_length(job)}{_at_step(job)}."


def _unseen(job: TrainingJob, local: bool) -> str:
    if job.spec.managed_by != constants.MANAGED_BY:
        return f"Not started: spec.managedBy gives this job to {job.spec.managed_by}."
    if local:
        return (
            "Not started: `lockstep run` has made its folder and no more. If it runs no longer, remove the folder and "
            "run the manifest again."
        )
    return (
        "No operator has seen this job yet; is one running, and does it watch this namespace? "
        "(kubectl get deployments -A -l app.kubernetes.io/name=lockstep)"
    )


def _conditions(job: TrainingJob) -> list[str]:
    conditions = {condition.type: condition for condition in job.status.conditions}
    told: list[Condition] = []
    ready = conditions.get(constants.CONDITION_READY)
    if ready and ready.status != "True" and job.status.phase in (Phase.PENDING, Phase.STARTING, Phase.RECOVERING):
        told.append(ready)
    told += [
        conditions[kind]
        for kind in (
            constants.CONDITION_FAILED,
            constants.CONDITION_SHRUNK,
            constants.CONDITION_CHECKPOINT_DEGRADED,
            constants.CONDITION_MIXED_IMAGES,
        )
        if kind in conditions and conditions[kind].status == "True"
    ]
    return [_stop(condition.message) for condition in told if condition.message]


def _other_data(job: TrainingJob) -> list[str]:
    """Another job's checkpoint may have had other data, and data.onChange may accept it: neither ends the job."""
    other = job.status.progress.other_data
    return [_stop(f"Trained on other data {other}")] if other else []


def _verdicts(job: TrainingJob) -> list[str]:
    """Ranks that make the others wait now, or compute wrong numbers, and what is done about slow ones."""
    if job.status.phase and job.status.phase.terminal:
        return []
    standing = [one for one in job.status.verdicts if one.ended is None]
    told = [f"{one.kind}: {verdict(one)}. {sentence(one.evidence)}" for one in standing]
    done = [one for one in job.status.conditions if one.type == constants.CONDITION_SLOW_NODE and one.status == "True"]
    return told + [_stop(one.message) for one in done]


def _injected(job: TrainingJob, now: float) -> list[str]:
    """The last fault that somebody has made."""
    if not job.status.injections:
        return []
    last = job.status.injections[-1]
    return [f"A fault was {injected(last)}, {times.ago(now - times.parse(last.at))} ago."]


def _last_fault(job: TrainingJob, now: float) -> list[str]:
    if not job.status.faults:
        return []
    fault = job.status.faults[-1]
    told = describe(fault, job.status, known=failure(job.status))
    text = f"Last fault {times.ago(now - times.parse(fault.at))} ago: {told}."
    count = job.status.restarts.total
    return [text, f"{count} restarts in all."] if count > 1 else [text]


def _excluded(job: TrainingJob, now: float) -> list[str]:
    """Nodes that its own faults named; those that all jobs avoid are the administrator's matter."""
    if job.status.phase and job.status.phase.terminal:
        return []
    named = [f"{one.node} ({one.reason})" for one in job.status.excluded_nodes if now < times.parse(one.until)]
    return [f"Its new pods stay away from {', '.join(named)}."] if named else []


def _budgets(job: TrainingJob) -> list[str]:
    used, allowed = job.status.budgets_used, job.spec.resilience.budgets
    budgets = (
        ("inProcess", used.in_process, allowed.in_process),
        ("process", used.process, allowed.process),
        ("pod", used.pod, allowed.pod),
    )
    return [
        f"Budget {name}: {taken} of {limit} used since the last durable checkpoint."
        for name, taken, limit in budgets
        if taken and taken * 2 >= limit and not (job.status.phase and job.status.phase.terminal)
    ]


def _durable(job: TrainingJob) -> str:
    durable = job.status.checkpoint.durable
    return f"It goes on from step {durable.step}." if durable else "It has no checkpoint yet and would start again."


def _done(job: TrainingJob) -> str:
    if job.status.progress.step:
        return f": step {job.status.progress.step}"
    return ": checkpoint.resumeFrom had all steps already" if job.spec.trainer else ""


def _loss(job: TrainingJob) -> str:
    progress = job.status.progress
    training = f", loss {progress.loss:.3f}" if progress.loss is not None else ""
    return training + (f", held-out loss {progress.eval_loss:.3f}" if progress.eval_loss is not None else "")


def _at_step(job: TrainingJob) -> str:
    return f" at step {job.status.progress.step}" if job.status.progress.step else ""


def _length(job: TrainingJob) -> str:
    status = job.status
    if not status.start_time or not status.completion_time:
        return "an unknown time"
    return times.ago(times.parse(status.completion_time) - times.parse(status.start_time))


def _stop(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
