"""What GPUs and links do under load, and what is wrong with that. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from lockstep_trainer.health.classify import Finding, of_gpu
from lockstep_trainer.health.readings import GpuReadings
from lockstep_trainer.health.table import Table

UNITS = {"matmul": "TFLOP/s", "copy": "GB/s", "h2d": "GB/s", "d2h": "GB/s"}
_SAID = {
    "matmul": "the matrix product",
    "copy": "copying in its memory",
    "h2d": "copying from the host",
    "d2h": "copying to the host",
}
ENOUGH = 3
"""GPUs whose median says what is usual."""
BUS_NODE = 8
"""GPUs among which the table's rate for collectives holds."""


@dataclass(frozen=True, slots=True)
class Burn:
    """One device in the burn-in."""

    device: int  # index
    model: str  # as torch names it; cpu
    rates: dict[str, float] = field(default_factory=dict)  # by UNITS
    rounds: int = 0  # products that were compared
    unequal: int = 0  # of these, how many differed from the first
    error: str = ""  # why there is nothing else


@dataclass(frozen=True, slots=True)
class Collective:
    """One row in the columns of nccl-tests (its doc/PERFORMANCE.md): bandwidths in GB/s, 10^9 bytes."""

    operation: str
    ranks: str  # 0-7 or 2,5
    size: int  # bytes
    count: int  # elements
    type: str
    redop: str
    time_us: float
    algbw: float
    busbw: float
    wrong: int = 0  # elements
    error: str = ""


def bus_bandwidth(operation: str, ranks: int, size: int, time_us: float) -> tuple[float, float]:
    """(algbw, busbw) in GB/s. The second is what the slowest link carries, so that it can be compared with the
    hardware whatever the number of ranks (nccl-tests, doc/PERFORMANCE.md)."""
    algbw = size / time_us / 1e3 if time_us > 0 else 0.0
    factor = {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "all_gather": (ranks - 1) / ranks,
        "reduce_scatter": (ranks - 1) / ranks,
        "sendrecv": 1.0,
    }[operation]
    return algbw, algbw * factor


def of_burns(burns: Sequence[Burn], gpus: Sequence[GpuReadings], table: Table) -> list[Finding]:
    """GPUs that compute differently from round to round, or too slowly. A CPU is only measured."""
    found: list[Finding] = []
    by_index = {gpu.index: gpu for gpu in gpus}
    medians = {
        measure: statistics.median(values)
        for measure in UNITS
        if len(values := [burn.rates[measure] for burn in burns if measure in burn.rates]) >= ENOUGH
    }
    for burn in burns:
        gpu = by_index.get(burn.device, GpuReadings(burn.device))
        if burn.error:
            failed = table.burnin["failed"]
            found.append(of_gpu("burnin.failed", failed, failed.says.format(error=burn.error), gpu))
        if burn.unequal:
            row = table.burnin["unequal"]
            said = row.says.format(unequal=burn.unequal, rounds=burn.rounds)
            found.append(of_gpu("burnin.unequal", row, said, gpu))
        expected = table.rates_of(burn.model)
        for measure, rate in burn.rates.items():
            usual, best = medians.get(measure), expected.expected(measure) if expected else None
            slow, slower = table.burnin["too-slow"], table.burnin["slower-than-others"]
            told = {"measure": _SAID[measure], "rate": rate, "unit": UNITS[measure], "model": burn.model}
            if best is not None and rate < best * table.floors[measure].share:
                said = slow.says.format(**told, share=rate / best, expected=best)
                found.append(of_gpu("burnin.too-slow", slow, said, gpu))
            elif usual is not None and expected and slower.below is not None and rate < usual * slower.below:
                said = slower.says.format(**told, share=rate / usual)
                found.append(of_gpu("burnin.slower-than-others", slower, said, gpu))
    return found


def of_collectives(rows: Sequence[Collective], model: str, table: Table) -> list[Finding]:
    """Collectives that fail, give wrong values, or are too slow where the table knows what is usual."""
    found: list[Finding] = []
    rates = table.rates_of(model)
    expected = rates.allreduce if rates else None
    largest = max((row.size for row in rows if row.operation == "all_reduce" and not row.error), default=0)
    for row in rows:
        values = {"operation": row.operation, "ranks": row.ranks, "size": row.size, "busbw": row.busbw}
        kind = ""
        if row.error:
            kind = "failed"
        elif row.wrong:
            kind = "wrong"
        elif expected and row.operation == "all_reduce" and row.size == largest and row.ranks == f"0-{BUS_NODE - 1}":
            expected *= table.floors["allreduce"].share
            kind = "too-slow" if row.busbw < expected else ""
        if kind:
            rule = table.collectives[kind]
            said = rule.says.format(**values, error=row.error, expected=expected or 0)
            found.append(Finding(f"collectives.{kind}", rule.severity, said, rule.remedy))
    return found
