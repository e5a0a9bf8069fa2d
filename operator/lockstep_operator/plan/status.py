"""What the status says: progress, phase, conditions, columns."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep_api import constants, messages
from lockstep_api.v1alpha1 import (
    CheckpointInterval,
    CheckpointStatus,
    Condition,
    DurableCheckpoint,
    Injection,
    Members,
    MemorySnapshot,
    Phase,
    Progress,
    TrainingJob,
    TrainingJobStatus,
    Verdict,
)
from lockstep_operator.plan import bounds
from lockstep_operator.plan import width as width_rules
from lockstep_operator.plan.actions import Event
from lockstep_operator.plan.observed import Observed, Pod
from lockstep_operator.plan.slots import usable
from lockstep_operator.plan.times import rfc3339

VERDICTS_KEPT = 10
INJECTIONS_KEPT = 10
PROGRESS_PATIENCE = 2.0
"""Seconds between status writes when only progress moved: one job's writes stay below 1 per second at any size."""
LEDGER_PATIENCE = 30.0
"""Seconds between status writes when only time has passed."""

_PROGRESS_FIELDS = ("progress", "step", "loss", "checkpoint")
_LEDGER_FIELDS = ("ledger", "ledger_state", "goodput", "goodput_percent")


def patience(old: TrainingJobStatus, new: TrainingJobStatus) -> float | None:
    """Seconds that the write of ``new`` may wait since the last write; None if there is nothing to write. Decisions
    never wait."""
    different = {name for name in type(new).model_fields if getattr(old, name) != getattr(new, name)}
    if not different:
        return None
    if different - {*_PROGRESS_FIELDS, *_LEDGER_FIELDS}:
        return 0.0
    return PROGRESS_PATIENCE if different & set(_PROGRESS_FIELDS) else LEDGER_PATIENCE


def set_condition(
    status: TrainingJobStatus, job: TrainingJob, kind: str, value: str, *, reason: str, message: str, now: float
) -> TrainingJobStatus:
    """Status with that condition. The transition time moves only when the condition's status does."""
    old = find_condition(status, kind)
    same = old is not None and old.status == value
    fresh = Condition(
        type=kind,
        status=value,
        reason=bounds.name(reason),
        message=bounds.sentence(message),
        last_transition_time=old.last_transition_time if old and same else rfc3339(now),
        observed_generation=job.generation,
    )
    others = [condition for condition in status.conditions if condition.type != kind]
    place = next((i for i, condition in enumerate(status.conditions) if condition.type == kind), len(others))
    return status.model_copy(update={"conditions": [*others[:place], fresh, *others[place:]]})


def end_condition(
    status: TrainingJobStatus, job: TrainingJob, kind: str, *, reason: str, message: str, now: float
) -> TrainingJobStatus:
    """Status with that condition False, if it was True: what has never been is not spoken of."""
    old = find_condition(status, kind)
    if old is None or old.status == "False":
        return status
    return set_condition(status, job, kind, "False", reason=reason, message=message, now=now)


def find_condition(status: TrainingJobStatus, kind: str) -> Condition | None:
    """The condition of that type, if there is one."""
    return next((condition for condition in status.conditions if condition.type == kind), None)


def follow(status: TrainingJobStatus, job: TrainingJob, observed: Observed, now: float) -> TrainingJobStatus:
    """Status with the leader's newest progress in it. The caller has made sure that it leads the current epoch."""
    heard = observed.leader.progress if observed.leader else None
    if heard is None:
        return status
    old, newest = status.progress, heard.newest
    progress = Progress(
        step=newest.step if newest else old.step,
        steps=heard.steps if heard.steps is not None else old.steps,
        tokens=heard.tokens or old.tokens,
        loss=newest.loss if newest else old.loss,
        eval_loss=heard.eval_loss if heard.eval_loss is not None else old.eval_loss,
        tokens_per_second=round(heard.tokens_per_second, 1) if heard.tokens_per_second is not None else None,
        mfu=round(newest.mfu, 4) if newest and newest.mfu is not None else None,
        other_data=bounds.sentence(heard.other_data) or old.other_data,
        at=rfc3339(newest.at) if newest else old.at,
    )
    update: dict[str, object] = {"progress": progress}
    if newest:
        total = f"/{progress.steps}" if progress.steps is not None else ""
        update |= {"step": f"{progress.step}{total}", "loss": f"{newest.loss:.3f}"}
    update["verdicts"] = _verdicts(status.verdicts, heard, now)
    update["injections"] = _injections(status.injections, heard)
    update["checkpoint"] = _checkpoints(status.checkpoint, job, heard, now)
    return status.model_copy(update=update)


def _verdicts(old: Sequence[Verdict], heard: messages.Progress, now: float) -> list[Verdict]:
    """What the leader says of slow and corrupt ranks and of unusual figures, in the order in which they were found. Of
    earlier ones it may know nothing, being new: they are over then, since nobody looks at them any more."""
    told = [*map(_slow, heard.slow), *map(_corrupt, heard.corrupt), *map(_outlier, heard.outliers)]
    told.sort(key=lambda one: one.at)
    known = {(one.at, one.cause, *one.ranks) for one in told}
    gone = [one for one in old if (one.at, one.cause, *one.ranks) not in known]
    before = [one if one.ended else one.model_copy(update={"ended": rfc3339(now)}) for one in gone]
    kept = [*before, *told]
    while len(kept) > VERDICTS_KEPT:  # of what stands something may have to be done
        kept.remove(next((one for one in kept if one.ended), kept[0]))
    return kept


def _slow(one: messages.SlowVerdict) -> Verdict:
    return Verdict(
        kind="Slow",
        cause=bounds.name(one.cause),
        ranks=list(one.ranks[: bounds.RANKS]),
        nodes=bounds.names(one.nodes),
        since=one.since,
        slowdown=one.slowdown,
        cost=one.cost,
        evidence=bounds.sentence(one.evidence),
        at=rfc3339(one.at),
        ended=_ended(one.ended),
    )


def _corrupt(one: messages.CorruptVerdict) -> Verdict:
    return Verdict(
        kind="Corrupt",
        cause=bounds.name(one.kind),
        ranks=list(one.ranks[: bounds.RANKS]),
        nodes=bounds.names(one.nodes),
        devices=bounds.names(one.devices),
        since=one.since,
        confidence=one.confidence,
        seen=one.seen,
        evidence=bounds.sentence(one.evidence),
        at=rfc3339(one.at),
        ended=_ended(one.ended),
    )


def _outlier(one: messages.OutlierVerdict) -> Verdict:
    return Verdict(
        kind="Outlier",
        cause=bounds.name(one.signal),
        since=one.since,
        evidence=bounds.sentence(one.evidence),
        at=rfc3339(one.at),
        ended=_ended(one.ended),
    )


def _ended(at: float | None) -> str | None:
    return None if at is None else rfc3339(at)


def _injections(old: Sequence[Injection], heard: messages.Progress) -> list[Injection]:
    """What was known, and what the leader says of further faults made on purpose."""
    known = {one.id for one in old}
    new = [
        Injection(
            id=bounds.name(one.id),
            rank=one.rank,
            node=bounds.name(one.node),
            what=bounds.sentence(one.what),
            at=rfc3339(one.at),
        )
        for one in heard.injected
        if bounds.name(one.id) not in known
    ]
    return [*old, *new][-INJECTIONS_KEPT:]


def _checkpoints(old: CheckpointStatus, job: TrainingJob, heard: messages.Progress, now: float) -> CheckpointStatus:
    """What the leader says of its checkpoints; what it does not know yet stays as it was."""
    durable, memory = old.durable, old.memory
    if heard.durable and heard.durable_uri and heard.durable_at is not None:
        durable = DurableCheckpoint(
            step=heard.durable.state.step,
            uri=heard.durable_uri[: bounds.URI_CHARACTERS],
            at=rfc3339(heard.durable_at),
            verified=bounds.names(heard.durable_verified) or None,  # an older agent does not say
        )
    if heard.kept is None:
        memory = None  # a new leader has not heard of one: nothing is promised
    elif memory is None or memory.step != heard.kept.step:
        memory = MemorySnapshot(step=heard.kept.step, at=rfc3339(now))
    return CheckpointStatus(durable=durable, memory=memory, interval=_interval(old.interval, job, heard))


def _interval(old: CheckpointInterval | None, job: TrainingJob, heard: messages.Progress) -> CheckpointInterval | None:
    """Steps between durable checkpoints, with what they were chosen from."""
    if job.spec.checkpoint is None or not heard.cadence or heard.newest is None or heard.newest.seconds <= 0:
        return old
    pace, fixed = heard.newest.seconds, job.spec.checkpoint.interval
    seconds = heard.cadence["interval"] if fixed is None else fixed * pace
    return CheckpointInterval(
        steps=fixed or max(1, round(seconds / pace)),
        seconds=round(seconds, 1),
        cost_seconds=heard.cadence["cost"],
        mtbf_seconds=round(heard.cadence["mtbf"]),
        formula="fixed" if fixed else "Young/Daly",
    )


def phase(status: TrainingJobStatus, job: TrainingJob, pods: Sequence[Pod], leads: bool, observed: Observed) -> Phase:
    """Where a job that is neither ended nor suspended stands. Starting lasts until the first time that it runs."""
    heard = observed.leader.progress if leads and observed.leader else None
    width = width_rules.current(job, status)
    if heard and heard.state in ("running", "finishing") and len(status.slots) == width:
        return Phase.RUNNING
    if status.phase in (Phase.RUNNING, Phase.RECOVERING):
        return Phase.RECOVERING
    scheduled = sum(1 for pod in pods if pod.node)
    return Phase.STARTING if (status.epoch > 0 and status.slots) or scheduled >= width else Phase.PENDING


def members(status: TrainingJobStatus, pods: Sequence[Pod], leads: bool, observed: Observed) -> Members:
    """Pods by role."""
    holding = set(status.slots.values())
    heard = observed.leader.progress if leads and observed.leader else None
    up = [pod for pod in pods if usable(pod, observed.agents)]
    return Members(
        ready=min(heard.connected, len(holding)) if heard else 0,
        spares=sum(1 for pod in up if pod.name not in holding) if status.epoch else 0,
        starting=sum(1 for pod in pods if pod.name not in holding and not usable(pod, observed.agents)),
    )


def conditions(
    status: TrainingJobStatus, job: TrainingJob, pods: Sequence[Pod], observed: Observed, *, leads: bool, now: float
) -> TrainingJobStatus:
    """Status with Ready and CheckpointDegraded in it; ``status.phase`` is the new one already."""
    if status.phase == Phase.RUNNING:
        # No step in it: the message would change with each, and every change of a condition is written at once.
        text = f"All {len(status.slots)} members run."
        status = set_condition(status, job, constants.CONDITION_READY, "True", reason="Training", message=text, now=now)
    else:
        reason, message = explain(status, job, pods, observed)
        have = width_rules.supply(job, status, {pod.ordinal: pod for pod in pods}, observed, now=now)
        message = f"{message}. {width_rules.prospect(job, status, have)}".removesuffix(". ")
        status = set_condition(status, job, constants.CONDITION_READY, "False", reason=reason, message=message, now=now)

    status = _shrunk(status, job, pods, now)
    heard = observed.leader.progress if leads and observed.leader else None
    if heard is None or job.spec.checkpoint is None:
        return status
    kind = constants.CONDITION_CHECKPOINT_DEGRADED
    if heard.checkpoint_problem:
        return set_condition(
            status, job, kind, "True", reason="StoreUnavailable", message=heard.checkpoint_problem, now=now
        )
    return set_condition(
        status, job, kind, "False", reason="StoreAnswers", message="Checkpoints can be made durable.", now=now
    )


def _shrunk(status: TrainingJobStatus, job: TrainingJob, pods: Sequence[Pod], now: float) -> TrainingJobStatus:
    """Status with the condition Shrunk, where it says something new."""
    kind, width = constants.CONDITION_SHRUNK, width_rules.current(job, status)
    if width < job.spec.nodes:
        away = next((pod for pod in pods if not pod.node), None)
        why = f" {away.name}: {away.message or 'waits for the scheduler'}." if away else ""
        text = f"Training on {width} of {job.spec.nodes} nodes.{why} It grows when there are pods for more."
        return set_condition(status, job, kind, "True", reason="NoRoom", message=text, now=now)
    if find_condition(status, kind) is None:
        return status
    text = f"Training on all {job.spec.nodes} nodes."
    return set_condition(status, job, kind, "False", reason="AllNodes", message=text, now=now)


def checkpoint_events(before: TrainingJobStatus, after: TrainingJobStatus) -> tuple[Event, ...]:
    """That checkpoints are in trouble, or no longer: the condition forgets, `kubectl describe` shows it still."""
    kind = constants.CONDITION_CHECKPOINT_DEGRADED
    old, new = find_condition(before, kind), find_condition(after, kind)
    was, now = old is not None and old.status == "True", new is not None and new.status == "True"
    if new is None or was == now:
        return ()
    return (Event("Warning" if now else "Normal", new.reason, new.message),)


def explain(status: TrainingJobStatus, job: TrainingJob, pods: Sequence[Pod], observed: Observed) -> tuple[str, str]:
    """(reason, sentence) why the job is not running, the nearest obstacle first."""
    if observed.refusal:
        return "CreationRefused", observed.refusal.sentence
    wanted = job.spec.nodes + job.spec.spares
    for pod in pods:
        if pod.refused:
            return "PodRefused", f"{pod.name} was refused by the kubelet of {pod.node}: {pod.refused}"
    waiting = [pod for pod in pods if not pod.running]
    blocked = [pod for pod in waiting if pod.waiting and pod.waiting not in ("ContainerCreating", "PodInitializing")]
    if blocked:
        pod = blocked[0]
        return "ContainerWaits", f"{pod.name}: {pod.waiting}. {pod.message}".strip()
    unscheduled = [pod for pod in pods if not pod.node]
    if unscheduled:
        pod = unscheduled[0]
        text = f"{len(pods) - len(unscheduled)} of {wanted} pods are scheduled"
        kept_away = sorted({one.node for one in status.excluded_nodes} | observed.excluded)
        named = ", ".join(kept_away[:5]) + (f" and {len(kept_away) - 5} more" if len(kept_away) > 5 else "")
        away = f" (excluded nodes: {named}; see `lockstep nodes` and status.excludedNodes)" if kept_away else ""
        return "PodsPending", f"{text}; {pod.name}: {pod.message or 'waits for the scheduler'}{away}"
    if len(pods) < wanted:
        return "PodsCreating", f"{len(pods)} of {wanted} pods exist"
    if vacant := width_rules.current(job, status) - len(status.slots):
        up = sum(1 for pod in pods if usable(pod, observed.agents))
        what = "a slot waits" if vacant == 1 else f"{vacant} slots wait"
        return "MembersStarting", f"{what} for a pod; {up} of {len(pods)} agents answer"
    heard = observed.leader.progress if observed.leader and observed.leader.connected else None
    if heard is None:
        return "LeaderConnecting", f"Waiting for the leader, {status.slots.get('0', 'slot 0')}"
    words = {"forming": "members connect", "starting": "workers start", "recovering": "workers start again"}
    return "WorkersStarting", f"{words.get(heard.state, heard.state)}; {heard.connected} of {len(status.slots)} members"
