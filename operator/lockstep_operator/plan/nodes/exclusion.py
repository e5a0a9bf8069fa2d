"""Which nodes new pods stay away from, and the breaker that keeps the operator from excluding a cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lockstep_operator.plan.nodes.records import BY_ADMINISTRATOR, BY_SCORE, Exclusion, NodeFault, NodeRecord, Records
from lockstep_operator.plan.nodes.score import HORIZON, RELEASE, THRESHOLD, counted, score

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How many nodes may be excluded by their score. An administrator's exclusions are neither counted nor limited."""

    per_hour: int = 4
    """At most so many in any hour; 0: none at all. Beyond that the fault is probably not the nodes': one bad switch,
    driver or image looks like many bad nodes. NVSentinel has such a breaker on cordons for the same reason."""
    share: float = 0.1
    """At most this share of the cluster's nodes at any time, but one may always be."""


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a node, for events."""

    node: str
    kind: str  # NodeExcluded, NodeReleased, NodeExclusionHeld
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Records as they should be now, and what has changed."""

    records: Records
    changes: tuple[Change, ...] = ()
    held: str = ""  # why the breaker keeps nodes in use that should be excluded; "" if it keeps none
    kept_in_use: tuple[str, ...] = ()  # those nodes


def allowance(since: Iterable[float], now: float, per_hour: int) -> int:
    """How many more may be excluded now, after exclusions at these times: in no window of an hour more than that."""
    return max(0, per_hour - sum(1 for at in since if now - at < HOUR))


def excluded(records: Records, now: float) -> tuple[str, ...]:
    """Nodes that new pods must stay away from."""
    return tuple(
        sorted(
            name
            for name, record in records.items()
            if record.exclusion and (record.exclusion.until is None or now < record.exclusion.until)
        )
    )


def decide(records: Records, *, nodes: int, now: float, limits: Limits) -> Outcome:
    """End what is over, exclude what is due, forget what is old. ``nodes``: how many the cluster has; 0: not known."""
    valid = counted(records, now)
    values = {name: score(faults, now) for name, faults in valid.items()}
    kept: dict[str, NodeRecord] = {}
    changes: list[Change] = []
    for name, record in records.items():
        over = _over(record.exclusion, values[name], now) if record.exclusion else ""
        if over:
            changes.append(Change(name, "NodeReleased", over))
        kept[name] = replace(record, exclusion=None) if over else record

    due = sorted(
        (name for name, record in kept.items() if record.exclusion is None and values[name] >= THRESHOLD),
        key=lambda name: (-values[name], name),
    )
    own = [record.exclusion for record in kept.values() if record.exclusion and record.exclusion.by == BY_SCORE]
    by_hour = allowance((exclusion.since for exclusion in own), now, limits.per_hour)
    by_share = max(1, int(nodes * limits.share)) - len(own) if nodes else by_hour
    granted = max(0, min(by_hour, by_share))
    for name in due[:granted]:
        reason = _reason(valid[name], values[name])
        kept[name] = replace(kept[name], exclusion=Exclusion(now, BY_SCORE, reason))
        changes.append(Change(name, "NodeExcluded", f"New pods of training jobs stay away from it: {reason}."))
    held = _held(due[granted:], by_hour <= by_share, limits)
    kept = {name: _pruned(record, now) for name, record in kept.items()}
    kept = {name: record for name, record in kept.items() if record != NodeRecord()}
    return Outcome(kept if kept != dict(records) else records, tuple(changes), held, tuple(due[granted:]))


def exclude(records: Records, node: str, *, reason: str, until: float | None, now: float) -> Records:
    """An administrator's exclusion."""
    record = records.get(node) or NodeRecord()
    return {**records, node: replace(record, exclusion=Exclusion(now, BY_ADMINISTRATOR, reason, until))}


def clear(records: Records, node: str, now: float) -> Records:
    """An administrator's word that the node is good: nothing that happened until now counts. Raises KeyError if
    nothing is known of it."""
    if node not in records:
        raise KeyError(node)
    return {**records, node: NodeRecord(forgiven=now)}


def release_at(faults: Iterable[NodeFault], now: float) -> float:
    """When the score of these faults will have decayed below RELEASE if nothing else happens, to the minute."""
    kept = list(faults)
    low, high = now, now + HORIZON
    while high - low > 60.0:
        middle = (low + high) / 2
        low, high = (middle, high) if score(kept, middle) >= RELEASE else (low, middle)
    return high


def _over(exclusion: Exclusion, value: float, now: float) -> str:
    """Why an exclusion ends now, or ""."""
    if exclusion.until is not None and now >= exclusion.until:
        return "The time for which it was excluded has passed."
    if exclusion.by == BY_SCORE and value < RELEASE:
        return f"Its score has decayed to {value:.1f}."
    return ""


def _reason(faults: Iterable[NodeFault], value: float) -> str:
    """Its score, and what of."""
    causes: dict[str, int] = {}
    jobs = set()
    for fault in faults:
        causes[fault.cause] = causes.get(fault.cause, 0) + 1
        jobs.add(fault.job)
    named = ", ".join(f"{cause} {count}x" if count > 1 else cause for cause, count in sorted(causes.items()))
    where = "one job" if len(jobs) == 1 else f"{len(jobs)} jobs"
    return f"score {value:.1f} of {THRESHOLD:g}, from {where}: {named}"


def _held(names: list[str], by_hour: bool, limits: Limits) -> str:
    if not names:
        return ""
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    bound = (
        f"{limits.per_hour} in an hour (nodes.excludePerHour)"
        if by_hour
        else f"{limits.share:.0%} of the cluster (nodes.excludeShare)"
    )
    return (
        f"Not excluded, though over the threshold: {listed}. More than {bound} would be excluded; so many at once "
        "point to something that they share: network, power, driver, image."
    )


def _pruned(record: NodeRecord, now: float) -> NodeRecord:
    """Without what can't count any more."""
    forgiven = record.forgiven if record.forgiven is not None and now - record.forgiven < HORIZON else None
    faults = tuple(fault for fault in record.faults if now - fault.at < HORIZON)
    return NodeRecord(faults, record.exclusion, forgiven)
