"""What may be seen of a job behind a fault. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from e2e.matrix.faults import Fault
from e2e.matrix.moments import Phase
from lockstep_api.v1alpha1 import Fault as Record
from lockstep_api.v1alpha1 import TrainingJob

Key = tuple[str, int, int]
PRELUDE = 2
"""Restarts that the worker may cost which is killed first, where the instant is one of a recovery."""


def key_of(record: Record) -> Key:
    """What stays of a record while it is completed."""
    return (record.at, record.epoch, record.generation)


def fresh(before: TrainingJob, after: TrainingJob) -> list[Record]:
    """Faults that were recorded since."""
    known = {key_of(record) for record in before.status.faults}
    return [record for record in after.status.faults if key_of(record) not in known]


def recovered(before: TrainingJob, now: TrainingJob, fault: Fault) -> bool:
    """Whether the job trains again, behind a record of such a fault, and all records say what they cost."""
    records = fresh(before, now)
    told = any(record.cause in fault.causes for record in records)
    return told and now.status.phase in ("Running", "Succeeded") and records[-1].steps_lost is not None


def most_restarts(fault: Fault, phase: Phase) -> int:
    """How many there may be."""
    if fault.silent and not phase.recovers:
        return 0
    return fault.restarts + (PRELUDE if phase.recovers else 0)


def problems(before: TrainingJob, after: TrainingJob, fault: Fault, phase: Phase) -> list[str]:
    """What is not as it may be, in sentences."""
    found = []
    records = fresh(before, after)
    restarts = after.status.restarts.total - before.status.restarts.total
    most = most_restarts(fault, phase)
    if restarts > most:
        found.append(f"{restarts} restarts instead of at most {most}: {_told(records)}")
    if fault.silent and not phase.recovers:
        return found
    mine = [record for record in records if record.cause in fault.causes]
    if not fault.silent and not mine:
        found.append(f"no fault of {fault.causes} is recorded: {_told(records)}")
    # Where something else is being recovered from, a fault at the same place may take a rung more.
    rungs = fault.rungs | ({"pod"} if phase.recovers else frozenset())
    if mine and not any(record.rung in rungs for record in mine):
        found.append(f"none of {sorted(rungs)} was the rung: {_told(mine)}")
    lost = sum(record.steps_lost or 0 for record in records)
    if lost > fault.lost * max(1, len(records)):
        found.append(f"{lost} steps were lost instead of at most {fault.lost} each time: {_told(records)}")
    return found


def _told(records: Iterable[Record]) -> str:
    return "; ".join(
        f"{record.cause} ({record.witness}) at {record.at} in epoch {record.epoch}, generation {record.generation}: "
        f"{record.rung}, {record.steps_lost} steps lost"
        for record in records
    ) or "nothing"  # fmt: skip
