"""Readings → findings. Pure: what is bad, and how bad, is in the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lockstep_trainer.health.readings import GpuReadings, HostReadings, Readings
from lockstep_trainer.health.table import ReadingRow, Severity, Table


@dataclass(frozen=True, slots=True)
class Finding:
    """Something is not as it should be."""

    kind: str  # name of the row: gpu.remap-pending, xids.79, burnin.too-slow
    severity: Severity
    evidence: str  # what was read, in words
    remedy: str
    gpu: int | None = None  # index; None: the machine's
    serial: str = ""
    uuid: str = ""

    def __str__(self) -> str:
        """One sentence without a full stop."""
        known = ", ".join(filter(None, (f"serial {self.serial}" if self.serial else "", self.uuid)))
        where = f"GPU {self.gpu}{f' ({known})' if known else ''}: " if self.gpu is not None else ""
        return f"{where}{self.evidence} [{self.kind}]; {self.remedy}"


def classify(readings: Readings, table: Table) -> tuple[Finding, ...]:
    """All findings but those to ignore, the worst first."""
    found: list[Finding] = []
    for gpu in readings.gpus:
        rows = {"lost": table.gpu["lost"]} if gpu.lost else table.gpu  # it has told nothing else
        found += [of_gpu(f"gpu.{name}", row, _said(row, gpu), gpu) for name, row in rows.items() if holds(row, gpu)]
    host = readings.host
    for name, row in table.host.items():
        if holds(row, host):
            found.append(Finding(f"host.{name}", row.severity, _said(row, host), row.remedy))
    by_index = {gpu.index: gpu for gpu in readings.gpus}
    for xid in dict.fromkeys(readings.xids):
        error = table.xid(xid.code)
        said = f"Xid {xid.code} was reported: {error.name}"
        if xid.gpu is None:
            found.append(Finding(f"xids.{xid.code}", error.severity, said, error.remedy))
        else:
            gpu = by_index.get(xid.gpu, GpuReadings(xid.gpu))
            found.append(
                Finding(f"xids.{xid.code}", error.severity, said, error.remedy, gpu.index, gpu.serial, gpu.uuid)
            )
    return worst_first(found)


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Without those to ignore."""
    order = list(Severity)
    return tuple(
        sorted(
            (one for one in findings if one.severity is not Severity.IGNORE),
            key=lambda one: (order.index(one.severity), -1 if one.gpu is None else one.gpu, one.kind),
        )
    )


def of_gpu(kind: str, row: Any, evidence: str, gpu: GpuReadings) -> Finding:
    """A finding of this row about this GPU."""
    return Finding(kind, row.severity, evidence, row.remedy, gpu.index, gpu.serial, gpu.uuid)


def holds(row: ReadingRow, readings: GpuReadings | HostReadings) -> bool:
    """Whether the row finds something. A reading that is not there is no finding."""
    value = getattr(readings, row.reading)
    if value is None:
        return False
    if row.set is not None:
        return bool(value) == row.set
    if row.above is not None:
        return bool(value > row.above)
    if row.below is not None:
        return bool(value < row.below)
    if row.bits is not None:
        return bool(value & row.bits)
    other = getattr(readings, row.less_than or row.of or row.reading)
    if other is None:
        return False
    return bool(value < other if row.above_share is None else value > row.above_share * other)


def _said(row: ReadingRow, readings: GpuReadings | HostReadings) -> str:
    values = {field.name: getattr(readings, field.name) for field in dataclasses.fields(readings)}
    return row.says.format(**{name: _text(value) for name, value in values.items()})


def _text(value: Any) -> Any:
    if value is None:
        return "unknown"
    return ", ".join(value) if isinstance(value, tuple) else value
