"""The operator's half of the ledger: every GPU-second that a pod was held, in exactly one class.

Members' time is classified by the leader, in totals that are cumulative within an epoch; the operator adds the time
outside membership (queued, starting, idle spare, recovering, suspended) and whatever the leader's totals leave open.
The sum over the classes is the sum over the pods of the time that they were seen to be held, times their GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lockstep_api.v1alpha1 import LedgerState, Phase, TrainingJobStatus
from lockstep_operator.plan import bounds
from lockstep_operator.plan.observed import Pod
from lockstep_operator.plan.pool import incarnation_of

PRODUCTIVE = "productive"
QUEUED = "queued"
SUSPENDED = "suspended"
STARTING = "starting"
RECOVERING = "recovering"
DETECTING = "detecting"
IDLE_SPARE = "idleSpare"
UNATTRIBUTED = "unattributed"

_OUTSIDE_GOODPUT = (QUEUED, SUSPENDED)


@dataclass(frozen=True, slots=True)
class _Held:
    members: float
    others: dict[str, float]


def fold(
    status: TrainingJobStatus,
    pods: tuple[Pod, ...],
    gpus_per_node: int,
    leader_totals: Mapping[str, float] | None,
    now: float,
) -> TrainingJobStatus:
    """Status with the ledger brought up to ``now``. ``leader_totals`` are those of the current epoch, or None."""
    if not pods:
        return status
    state = status.ledger_state
    held = _held(status, pods, gpus_per_node, state.at, now)
    totals = _bounded(leader_totals) if leader_totals is not None else state.leader
    base, member_seconds = _add(state.base, held.others), state.member_seconds + held.members
    if sum(totals.values()) < sum(state.leader.values()) - 1e-6:
        # The leader's agent started its count again: what it had counted is closed.
        base = _add(base, state.leader)
        member_seconds = max(0.0, member_seconds - sum(state.leader.values()))
    return _with(status, LedgerState(at=now, base=base, member_seconds=member_seconds, leader=totals))


def close_epoch(status: TrainingJobStatus, rest: str | None = None) -> TrainingJobStatus:
    """Fold the epoch's totals into the base: later reports of that epoch are dropped, so this is their last word.
    ``rest`` is the class of what they leave open, where it is known better than from the phase."""
    state = status.ledger_state
    base = _add(state.base, _members(status, state, rest))
    return _with(status, LedgerState(at=state.at, base=base, member_seconds=0.0, leader={}))


def _with(status: TrainingJobStatus, state: LedgerState) -> TrainingJobStatus:
    classes = sorted(_add(state.base, _members(status, state)).items())
    ledger = {name: round(value, 3) for name, value in classes if value > 0}
    counted = sum(value for name, value in ledger.items() if name not in _OUTSIDE_GOODPUT)
    # Only step records are productive: a script that writes none has no goodput, rather than one of zero.
    goodput = ledger[PRODUCTIVE] / counted if PRODUCTIVE in ledger else None
    return status.model_copy(
        update={
            "ledger_state": state,
            "ledger": ledger,
            "goodput": None if goodput is None else round(goodput, 4),
            "goodput_percent": None if goodput is None else f"{goodput:.1%}",
        }
    )


def _members(status: TrainingJobStatus, state: LedgerState, name: str | None = None) -> dict[str, float]:
    """The members' time by class; what the leader's totals leave open goes to the class of the phase. Productive time
    comes only from step records, so an open remainder while running is unattributed until the next report."""
    rest = state.member_seconds - sum(state.leader.values())
    by_phase = {Phase.RUNNING: UNATTRIBUTED, Phase.RECOVERING: RECOVERING, Phase.SUSPENDING: SUSPENDED}
    name = name or by_phase.get(status.phase or Phase.PENDING, STARTING)
    return _add(state.leader, {name: rest}) if rest > 0 else dict(state.leader)


def _held(status: TrainingJobStatus, pods: tuple[Pod, ...], gpus: int, since: float, now: float) -> _Held:
    """GPU-seconds since the last time, of members and of the others by class."""
    members = set(status.slots.values()) if status.slot_map_hash else set()
    held_by_members, others = 0.0, dict[str, float]()
    for pod in pods:
        seconds = max(0.0, now - max(since, pod.created)) * gpus
        if seconds == 0 or pod.ended:
            continue
        if pod.name in members and not pod.deleting:
            held_by_members += seconds
        else:
            name = _class_of(pod, status)
            others[name] = others.get(name, 0.0) + seconds
    return _Held(held_by_members, others)


def _class_of(pod: Pod, status: TrainingJobStatus) -> str:
    if status.phase in (Phase.SUSPENDING, Phase.SUSPENDED):
        return SUSPENDED
    if not pod.node:
        return QUEUED
    given_up = pod.deleting or pod.incarnation != incarnation_of(status.incarnations, pod.ordinal)
    if given_up or status.phase == Phase.RECOVERING:
        return RECOVERING
    if status.phase == Phase.RUNNING and pod.running:
        return IDLE_SPARE
    return STARTING


def _add(left: Mapping[str, float], right: Mapping[str, float]) -> dict[str, float]:
    return _bounded({name: left.get(name, 0.0) + right.get(name, 0.0) for name in {**left, **right}})


def _bounded(totals: Mapping[str, float]) -> dict[str, float]:
    """As many classes as a status can hold, the first ones; the time of all others is unattributed."""
    kept: dict[str, float] = {}
    for name, value in ((bounds.name(name), value) for name, value in totals.items()):
        fits = name in kept or len(kept) < bounds.CLASSES
        kept[name if fits else UNATTRIBUTED] = kept.get(name if fits else UNATTRIBUTED, 0.0) + value
    return kept
