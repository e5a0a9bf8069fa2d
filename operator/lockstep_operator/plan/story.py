"""What happened, in words: the events of `kubectl describe`, and the clauses that `lockstep why` is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep_api.v1alpha1 import Fault, Injection, Phase, TrainingJobStatus, Verdict
from lockstep_operator.plan.actions import Event

if TYPE_CHECKING:
    from lockstep_operator.plan.losses import Loss

_WHAT = {
    "WorkerExited": "a worker died",
    "AgentLost": "an agent died",
    "StoreLost": "the rendezvous store died",
    "PodLost": "a pod was lost",
    "MemberLost": "a member was lost",
    "NodeLost": "a node was lost",
    "NodeDrained": "a node was drained",
    "NodeLeaving": "the end of a node was announced",
    "GpuUnhealthy": "a GPU became unhealthy",
    "PreflightFailed": "a node failed the preflight checks",
    "Straggler": "a node was slow",
    "LeaderLost": "the leader was lost",
    "ContainerRestarted": "a container was restarted",
    "StaleRestore": "workers began behind a state that the chain had left",
    "Hang": "no step was finished in time",
    "Corruption": "a rank computed wrong numbers",
    "CorruptionSuspected": "ranks disagreed",
    "FinalCheckpointMissing": "the last checkpoint was lost before it was durable",
}
_DONE = {
    "inProcess": "its workers went on in the same processes",
    "process": "its workers were started again in place",
    "container": "its container was started again in place",
    "spare": "a spare took the slot",
    "pod": "a new pod took the slot",
    "shrink": "training went on with fewer nodes",
    "requeue": "all pods were let go, to begin again later",
}
_NEXT = {
    "inProcess": "its workers go on in the same processes",
    "process": "its workers are started again in place",
    "container": "its container is started again in place",
    "spare": "a spare takes the slot",
    "pod": "a new pod takes the slot",
}
_FROM = {
    "memory": " from its pods' memory",
    "buddy": " from the memory of a buddy",
    "store": " from the last checkpoint in the store",
}
_SLOW = {
    "Clock": "a low clock",
    "Memory": "slow memory",
    "Compute": "a slow device at its full clock",
    "Host": "a host that is late in giving work",
    "Network": "a slow link",
    "Data": "waiting for batches",
    "Pauses": "pauses of its processes",
    "PipelineImbalance": "a pipeline stage with more to do than the others",
    "LengthImbalance": "documents that are longer than those of others",
}
_FIGURES = {
    "loss": "the loss",
    "gradientNorm": "the gradient's norm",
    "updateSize": "the size of the optimizer's update",
}
_NAMED = 8
"""Ranks that a sentence names at most."""
_ACTIVE = (Phase.PENDING, Phase.STARTING, Phase.RUNNING, Phase.RECOVERING)
_PARTS = ("detect", "decide", "restart", "restore", "first_step", "recompute")


def describe(fault: Fault, status: TrainingJobStatus, *, known: str = "") -> str:
    """What broke, what was done, what it cost: one clause without a full stop. ``status``: the job's, whose fault it
    is; ``known``: a sentence that is told anyway, and is not told twice."""
    return f"{broke(fault, known)}; {_answer(fault, status)}"


def _answer(fault: Fault, status: TrainingJobStatus) -> str:
    done = _DONE.get(fault.rung, fault.rung)
    if _has_cost(fault):
        return f"{done} in {sum(fault.seconds.values()):.1f} s{_redone(fault)}"
    if fault.steps_lost is not None or _key(fault) != _key(status.faults[-1]):
        return done  # another was mended with it, or came before it was over
    if status.phase == Phase.FAILED:
        return "the job ends"
    return _NEXT.get(fault.rung, done) if status.phase in _ACTIVE else done


def broke(fault: Fault, known: str = "") -> str:
    """What broke, where, and what is known of it."""
    what = _WHAT.get(fault.cause, fault.cause)
    if fault.exit_code is not None:
        what += f" by signal {-fault.exit_code}" if fault.exit_code < 0 else f" with exit code {fault.exit_code}"
    places = (
        f"rank {fault.rank}" if fault.rank is not None else "",
        fault.pod or "",
        f"node {fault.node}" if fault.node else "",
    )
    named = ", ".join(filter(None, places))
    message = "" if fault.message in known else fault.message.removesuffix(".")
    return f"{what}{f' ({named})' if named else ''}{f': {message}' if message else ''}"


def loss_event(loss: Loss) -> Event:
    """A pod is given up."""
    where = f" on {loss.node}" if loss.node else ""
    held = f", which held slot {loss.slot}" if loss.slot is not None else ""
    why = f": {loss.message}" if loss.message else ""
    bad = loss.counts or loss.cause == "PodRefused"
    return Event("Warning" if bad else "Normal", loss.cause, f"{loss.pod}{where}{held} is given up{why}")


def fault_events(before: TrainingJobStatus, after: TrainingJobStatus) -> tuple[Event, ...]:
    """Faults that were mended without another pod (the loss of one is told by who gives it up), and recoveries."""
    known = {_key(fault): fault for fault in before.faults}
    events: list[Event] = []
    for fault in after.faults:
        old = known.get(_key(fault))
        if old is None and fault.rung in ("inProcess", "process", "container"):
            events.append(Event("Warning", fault.cause, sentence(f"{broke(fault)}; {_NEXT[fault.rung]}")))
        if _has_cost(fault) and (old is None or old.steps_lost is None):
            parts = ", ".join(
                f"{name.replace('_', ' ')} {fault.seconds[name]:.1f}" for name in _PARTS if fault.seconds.get(name)
            )
            took = f"{sum(fault.seconds.values()):.1f} s after {_WHAT.get(fault.cause, fault.cause)}"
            source = _FROM.get(fault.restored_from, "")
            text = f"training goes on{source}, {took}{f' ({parts})' if parts else ''}{_redone(fault)}"
            events.append(Event("Normal", "Recovered", sentence(text)))
    return tuple(events)


def verdict(found: Verdict) -> str:
    """What is wrong with whom: one clause without a full stop."""
    if found.kind == "Outlier":
        return f"{_FIGURES.get(found.cause, found.cause)} was unusually large from step {found.since} on"
    return _corrupt(found) if found.kind == "Corrupt" else _slow(found)


def _slow(verdict: Verdict) -> str:
    cause = _SLOW.get(verdict.cause, verdict.cause)
    are = "are" if len(verdict.ranks) > 1 else "is"
    return (
        f"{_who(verdict)} {are} slowed down by {cause} since step {verdict.since}: {verdict.slowdown:.0%} longer, "
        f"at a cost of {verdict.cost:.1%} of the job's step time"
    )


def _corrupt(verdict: Verdict) -> str:
    first = f"first at step {verdict.since}"
    if verdict.cause == "Undecided":
        return f"{_who(verdict)} disagree about the same numbers, {first}, and nobody can say who is wrong"
    wrong = f"{_who(verdict)} computed wrong numbers, {first}"
    if len(verdict.ranks) > 1:
        wrong = f"one of {_who(verdict)} or more computed wrong numbers, {first}"
    return wrong + (", each time that it was looked at" if verdict.cause == "Permanent" else ", now and then")


def _who(verdict: Verdict) -> str:
    """The ranks of a verdict, and where they are."""
    more = f" and {len(verdict.ranks) - _NAMED} more" if len(verdict.ranks) > _NAMED else ""
    ranks = ", ".join(map(str, verdict.ranks[:_NAMED])) + more
    who = f"rank{'s' if len(verdict.ranks) > 1 else ''} {ranks}" if verdict.ranks else "the whole job"
    gpu = f"GPU {verdict.devices[0]}" if len(verdict.devices) == len(verdict.ranks) == 1 else ""
    node = f"node {', '.join(verdict.nodes)}" if verdict.nodes else ""
    place = ", ".join(filter(None, (node, gpu)))
    return f"{who} ({place})" if place else who


_EVENTS = {"Slow": "SlowRank", "Corrupt": "CorruptRank", "Outlier": "UnusualFigure"}


def verdict_events(before: TrainingJobStatus, after: TrainingJobStatus) -> tuple[Event, ...]:
    """Ranks that were found slow or corrupt, and those that are so no more. One that was put aside as soon as it was
    found is told of once."""
    known = {_verdict_key(one): one for one in before.verdicts}
    events: list[Event] = []
    for one in after.verdicts:
        old, reason = known.get(_verdict_key(one)), _EVENTS.get(one.kind, one.kind)
        if old is None and (one.ended is None or one.kind != "Slow"):
            events.append(Event("Warning", reason, f"{sentence(verdict(one))} {sentence(one.evidence)}".strip()))
        if old is not None and old.ended is None and one.ended is not None:
            events.append(Event("Normal", f"{reason}Ended", sentence(f"no longer: {verdict(one)}")))
    return tuple(events)


def injected(injection: Injection) -> str:
    """A fault that somebody has made: one clause without a full stop."""
    place = f" (node {injection.node})" if injection.node else ""
    return f"made on purpose, by `lockstep inject`, on rank {injection.rank}{place}: {injection.what}"


def injection_events(before: TrainingJobStatus, after: TrainingJobStatus) -> tuple[Event, ...]:
    """Faults that somebody has made, so that nobody takes them for real ones."""
    known = {one.id for one in before.injections}
    new = (one for one in after.injections if one.id not in known)
    return tuple(Event("Warning", "FaultInjected", f"A fault {injected(one)}.") for one in new)


def _verdict_key(found: Verdict) -> tuple[str, str, tuple[int, ...]]:
    return found.at, found.cause, tuple(found.ranks)


def _has_cost(fault: Fault) -> bool:
    """Whether it is mended, and what that took stands with it, not with another that was mended together with it."""
    return fault.steps_lost is not None and not fault.seconds.keys() <= {"detect"}


def _redone(fault: Fault) -> str:
    return f", {fault.steps_lost} step{'' if fault.steps_lost == 1 else 's'} redone"


def sentence(clause: str) -> str:
    """With a capital letter and a full stop; an empty one stays empty."""
    return f"{clause[:1].upper()}{clause[1:].removesuffix('.')}." if clause else ""


def _key(fault: Fault) -> tuple[int, int, str | None, str]:
    """What no later word on a fault changes: a loss may get another cause."""
    return fault.epoch, fault.generation, fault.pod, fault.at
