"""The faults of a job and what they cost: each is one record, counted once on its budget, whoever tells of it.

What the operator gives up itself (``losses``) and what leaders report are folded into the same records; recoveries,
and what nodes say later, complete them.
"""

from __future__ import annotations

from lockstep_api import tails
from lockstep_api.messages import FaultReport, Recovered, Term
from lockstep_api.v1alpha1 import Fault, TrainingJobStatus
from lockstep_operator.plan import bounds
from lockstep_operator.plan.losses import POD_GIVEN_UP, UNFIT, Loss
from lockstep_operator.plan.observed import Observed
from lockstep_operator.plan.pool import bump
from lockstep_operator.plan.times import rfc3339, unix

KEPT_FAULTS = 10
KEPT_TOGETHER, TOGETHER_SECONDS = 64, 60.0
"""So many more losses of pods are kept, those of so long before the newest fault: each node of a rack is to be excluded
and remembered, and 2 % of 2,048 nodes are 40 (see ``jobwide.breaker``)."""
_FIELD = {"inProcess": "in_process"}
"""Rungs whose counters have another name in Python."""
PLANNED = frozenset({"NodeDrained", "NodeLeaving", "Straggler"})
"""Causes that use up no budget: maintenance of a whole cluster must not end a job, and nothing here can loop. For slow
nodes there is ``resilience.stragglers.swapsPerHour``, which ends no job."""
CONFIRM_SECONDS = 600.0
"""A node that is not ready so soon after its member fell silent is why."""


def record(
    status: TrainingJobStatus, lost: list[Loss], *, generation: int, spares_ready: int, detect: float, now: float
) -> TrainingJobStatus:
    """Status with these losses in it: slots vacated, names used up, restarts and budget counted, faults kept. All in
    one status patch, so that none is counted twice or forgotten, whenever the operator dies."""
    slots = {slot: name for slot, name in status.slots.items() if name not in {loss.pod for loss in lost}}
    restarts, used, faults = status.restarts, status.budgets_used, list(status.faults)
    charged = [loss for loss in lost if loss.counts and _costs(loss.cause)]
    if any(loss.slot is None or not _lost_already(status) for loss in charged):
        used = used.model_copy(update={"pod": used.pod + 1})  # a rack, or a preemption, is one loss and not many
    for loss in lost:
        if not loss.counts:
            continue
        rung = "spare" if loss.slot is not None and spares_ready > 0 else "pod"
        spares_ready -= rung == "spare"
        restarts = restarts.model_copy(
            update={rung: getattr(restarts, rung) + 1, "total": restarts.total + 1},
        )
        fresh = Fault(
            at=rfc3339(now),
            epoch=status.epoch,
            generation=generation,
            cause=bounds.name(loss.cause),
            rung=rung,
            node=loss.node or None,
            pod=loss.pod,
            witness=bounds.name(loss.witness),
            message=bounds.sentence(loss.message),
            seconds={"detect": round(detect, 3)} if loss.slot is not None else {},
        )
        _merge(faults, fresh)
    return status.model_copy(
        update={
            "slots": slots,
            # A membership with a hole in it is none: the hash returns with the next epoch.
            "slot_map_hash": status.slot_map_hash if slots == status.slots else None,
            "incarnations": bump(status.incarnations, [loss.ordinal for loss in lost]),
            "restarts": restarts,
            "budgets_used": used,
            "faults": _kept(faults),
        }
    )


def _kept(faults: list[Fault]) -> list[Fault]:
    """The newest of them; what is kept beyond ten is so without the last words, which are large."""
    since = unix(faults[-1].at) - TOGETHER_SECONDS if faults else 0.0
    together = [one for one in faults[:-KEPT_FAULTS] if one.rung in POD_GIVEN_UP and unix(one.at) >= since]
    short = [one.model_copy(update={"log_tail": []}) if one.log_tail else one for one in together[-KEPT_TOGETHER:]]
    return [*short, *faults[-KEPT_FAULTS:]]


def _costs(cause: str) -> bool:
    return cause not in PLANNED and cause != UNFIT


def _lost_already(status: TrainingJobStatus) -> bool:
    """Whether the next epoch is still to be formed after a loss of this one that was counted: what else its members
    lose until then is the same loss. Such an epoch has no hash."""
    return status.slot_map_hash is None and any(
        fault.epoch == status.epoch
        and fault.rung in POD_GIVEN_UP
        and _costs(fault.cause)
        and fault.pod not in status.slots.values()
        for fault in status.faults
    )


def charge_unfit(before: TrainingJobStatus, status: TrainingJobStatus, lost: list[Loss]) -> TrainingJobStatus:
    """Status with the budget charged, once, where pods' nodes failed their checks and were not excluded for it now: the
    next pod may come to the same node, for ever. Those of a node that was excluded are free, since a large cluster
    always has some that are unfit, and each fails once."""
    known = {one.node for one in before.excluded_nodes}
    newly = {one.node for one in status.excluded_nodes} - known
    charged = any(loss.cause == UNFIT and loss.node not in newly for loss in lost)
    used = status.budgets_used
    return status.model_copy(update={"budgets_used": used.model_copy(update={"pod": used.pod + charged})})


def fold_reports(status: TrainingJobStatus, observed: Observed) -> TrainingJobStatus:
    """Status with the leader's fault reports and recoveries in it. The cursor keeps each from counting twice."""
    leader = observed.leader
    if leader is None:
        return status
    nodes = {pod.name: pod.node for pod in observed.pods}
    for report in sorted(leader.faults, key=lambda report: report.term):
        if report.term > cursor(status) and report.term.epoch <= status.epoch:
            status = _fold_report(status, report, nodes)
    for recovered in leader.recovered:
        status = _fold_recovered(status, recovered)
    return status


def _fold_report(status: TrainingJobStatus, report: FaultReport, nodes: dict[str, str]) -> TrainingJobStatus:
    pod = status.slots.get(str(report.slot)) if report.slot is not None else None
    restarts, used = status.restarts, status.budgets_used
    if report.rung != "pod":  # giving the pod up is the operator's own act, and counted there
        field = _FIELD.get(report.rung, report.rung)
        restarts = restarts.model_copy(update={field: getattr(restarts, field) + 1, "total": restarts.total + 1})
    if report.rung in ("inProcess", "process"):
        field = _FIELD.get(report.rung, report.rung)
        used = used.model_copy(update={field: getattr(used, field) + 1})
    faults = list(status.faults)
    fresh = Fault(
        at=rfc3339(report.at),
        epoch=report.term.epoch,
        generation=report.term.generation,
        cause=bounds.name(report.cause),
        rung=report.rung,
        node=nodes.get(pod or "") or None,
        pod=pod,
        rank=report.rank,
        exit_code=report.exit_code,
        witness=bounds.name(report.witness),
        seconds={"detect": round(report.detect_seconds, 3)},
        log_tail=tails.tail(report.log_tail),
        message=bounds.sentence(report.message),
        blame=report.blame,
    )
    _merge(faults, fresh)
    return status.model_copy(
        update={
            "restarts": restarts,
            "budgets_used": used,
            "faults": _kept(faults),
            "fault_cursor": f"{report.term.epoch}/{report.term.generation}",
        }
    )


def _merge(faults: list[Fault], fresh: Fault) -> None:
    """Append, or complete the other side's record of the same loss: a lost pod is seen by leader and operator. What
    happened to that pod before in the epoch, and was mended in place, is a fault of its own."""
    for index, known in enumerate(faults):
        same = known.pod and known.pod == fresh.pod and known.epoch == fresh.epoch
        if same and known.rung in POD_GIVEN_UP and fresh.rung in POD_GIVEN_UP:
            told = {name: value for name, value in fresh if value not in (None, "", [], {})}
            told |= {"at": known.at, "seconds": {**fresh.seconds, **known.seconds}}
            if fresh.rung == "pod" and known.rung in ("spare", "shrink", "requeue"):
                told["rung"] = known.rung
            faults[index] = known.model_copy(update=told)
            return
    faults.append(fresh)


def went_to(faults: list[Fault], rung: str) -> list[Fault]:
    """Faults, of which those for which no pod came say what was done instead."""
    return [
        fault.model_copy(update={"rung": rung}) if fault.rung == "pod" and fault.steps_lost is None else fault
        for fault in faults
    ]


def _fold_recovered(status: TrainingJobStatus, recovered: Recovered) -> TrainingJobStatus:
    """What was unfinished before that term is mended now. The newest of it gets what the recovery took: several faults,
    such as the losses of a rack's pods, had one recovery between them."""
    faults, finished = list(status.faults), False
    for index in range(len(faults) - 1, -1, -1):
        fault = faults[index]
        if fault.steps_lost is None and Term(fault.epoch, fault.generation) < recovered.term:
            seconds = {} if finished else recovered.seconds
            faults[index] = fault.model_copy(
                update={
                    "seconds": bounds.seconds({**fault.seconds, **seconds}),
                    "steps_lost": 0 if finished else recovered.steps_lost,
                    "restored_from": bounds.name(recovered.source),
                }
            )
            finished = True
    return status.model_copy(update={"faults": faults}) if finished else status


def refill(status: TrainingJobStatus) -> TrainingJobStatus:
    """Budgets are full again once a checkpoint newer than the newest fault is durable."""
    durable, used = status.checkpoint.durable, status.budgets_used
    if durable is None:
        return status
    full: dict[str, int] = {}
    spent = used.in_process or used.process or used.pod
    if spent and status.faults and unix(durable.at) > unix(status.faults[-1].at):
        full |= {"in_process": 0, "process": 0, "pod": 0}
    requeued = status.elastic.requeued_at
    if used.requeue and (requeued is None or unix(durable.at) > unix(requeued)):
        full["requeue"] = 0
    return status.model_copy(update={"budgets_used": used.model_copy(update=full)}) if full else status


def confirm(status: TrainingJobStatus, observed: Observed, now: float) -> TrainingJobStatus:
    """Status in which silence has a cause: a member fell silent, and shortly after its node is found to be down. Where
    somebody works on the node (it is cordoned) nothing more is said of it."""
    faults = list(status.faults)
    for index, fault in enumerate(faults):
        if fault.cause not in ("MemberLost", "LeaderLost") or not fault.node or not observed.nodes:
            continue
        node = observed.nodes.get(fault.node)
        down = node is None or (node.down and not node.cordoned)
        if down and now - unix(fault.at) < CONFIRM_SECONDS:
            witness = f"{fault.witness}, nodeCondition"
            faults[index] = fault.model_copy(update={"cause": "NodeLost", "witness": witness})
    return status if faults == status.faults else status.model_copy(update={"faults": faults})


def cursor(status: TrainingJobStatus) -> Term:
    """The newest fault that is counted in ``status``."""
    epoch, _, generation = status.fault_cursor.partition("/")
    return Term(int(epoch), int(generation))
