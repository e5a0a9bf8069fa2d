"""Which faults of a job speak against a node, and how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lockstep_api.v1alpha1 import Fault, TrainingJob
from lockstep_operator.plan.nodes.records import NodeFault, NodeRecord, Records
from lockstep_operator.plan.nodes.score import HORIZON, THRESHOLD
from lockstep_operator.plan.times import unix

KEPT_FAULTS = 8
"""Of one node; three are enough to exclude it."""

HARD = {
    "Corruption": THRESHOLD,  # a verdict that this node's GPU computes wrongly: once is enough
    "GpuUnhealthy": 1.5,  # the device plugin's word; it comes back after a reset: twice within eleven days
    "Straggler": 1.0,  # a verdict that its hardware is slow
    "NodeLost": 1.0,  # not ready while a job ran on it: power, kernel, network card
}
"""The node itself is the witness, or a verdict names it."""
SOFT = {
    "PreflightFailed": 1.0,  # the word of a user's container: it takes two jobs
    "Hang": 0.5,  # a rank that never arrived: as often the program's own doing
    "MemberLost": 0.25,  # silence; where the node was at fault its condition follows and makes this NodeLost
    "LeaderLost": 0.25,
}
NAMED = 1.0
"""A rule of ``resilience.retry`` says ExcludeNode: one user's word."""
SUSPECTED = 0.5
"""A worker's error may be its GPU's or the fabric's (CUDA, NCCL, ECC)."""


def weigh(fault: Fault) -> tuple[float, bool] | None:
    """(weight, hard), or None if the fault says nothing about its node: exceptions of the program, exit codes, pods
    that were deleted, evicted or drained, containers killed for memory, dead agents."""
    if not fault.node:
        return None
    if fault.cause in HARD:
        return HARD[fault.cause], True
    if fault.blame == "Named":
        return NAMED, False
    if fault.cause in SOFT:
        return SOFT[fault.cause], False
    return (SUSPECTED, False) if fault.blame == "Suspected" else None


def told_by(job: TrainingJob) -> dict[str, list[NodeFault]]:
    """Node → what the job's status tells of it. The same status tells the same again."""
    found: dict[str, list[NodeFault]] = {}
    for fault in job.status.faults:
        if weighed := weigh(fault):
            one = NodeFault(unix(fault.at), job.uid, fault.pod or "", fault.cause, *weighed)
            found.setdefault(fault.node or "", []).append(one)
    return found


def remember(records: Records, jobs: Iterable[TrainingJob], now: float) -> Records:
    """``records`` with what these jobs tell; the same object if that is nothing new. A fault that is known already
    counts as the worst that was told of it: a lost member may turn out to be a lost node."""
    changed: dict[str, NodeRecord] = {}
    for job in jobs:
        for node, told in told_by(job).items():
            record = changed.get(node) or records.get(node) or NodeRecord()
            faults = _with(record, told, now)
            if faults != record.faults:
                changed[node] = replace(record, faults=faults)
    return {**records, **changed} if changed else records


def _with(record: NodeRecord, told: Iterable[NodeFault], now: float) -> tuple[NodeFault, ...]:
    merged = {fault.key: fault for fault in record.faults}
    for fault in told:
        old, forgiven = merged.get(fault.key), record.forgiven is not None and fault.at <= record.forgiven
        if now - fault.at < HORIZON and not forgiven and (old is None or fault.weight > old.weight):
            merged[fault.key] = fault
    return tuple(sorted(merged.values(), key=lambda fault: (fault.at, fault.key))[-KEPT_FAULTS:])
