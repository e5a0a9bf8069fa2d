"""A report as tables in a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table as Grid
from rich.text import Text

from lockstep_trainer.health.measured import UNITS, Burn, Collective
from lockstep_trainer.health.preflight import Report
from lockstep_trainer.health.readings import GpuReadings
from lockstep_trainer.health.table import Severity

_STYLES = {Severity.FATAL: "bold red", Severity.WARN: "yellow", Severity.IGNORE: ""}


def tables(report: Report) -> Group:
    """GPUs, what they did under load, and what was found."""
    parts: list[Grid | Text] = []
    if report.readings.gpus:
        parts.append(_gpus(report.readings.gpus))
    elif report.readings.host.driver:
        parts.append(Text(f"NVML: {report.readings.host.driver}; no GPU was looked at."))
    if report.burns:
        parts.append(_burns(report.burns))
    if report.collectives:
        parts.append(_collectives(report.collectives))
    for one in report.findings:
        parts.append(Text(f"{one.severity}: {one}", style=_STYLES[one.severity]))
    if not report.findings:
        parts.append(Text(f"{report.node or 'This machine'}: nothing is wrong ({report.tier})."))
    return Group(*parts)


def _gpus(gpus: tuple[GpuReadings, ...]) -> Grid:
    grid = _grid(
        "GPU", "serial", "°C", "SM MHz", "memory MHz", "ECC errors", "remapped", "PCIe", "NVLinks", title="NVML"
    )
    for gpu in gpus:
        up = None if gpu.nvlinks is None else gpu.nvlinks - (gpu.nvlinks_down or 0)
        grid.add_row(
            f"{gpu.index} {gpu.name or gpu.lost}",
            gpu.serial,
            _cell(gpu.temperature),
            _of(gpu.clock_sm, gpu.clock_sm_max),
            _of(gpu.clock_memory, gpu.clock_memory_max),
            _of(gpu.ecc_uncorrected_volatile, gpu.ecc_corrected_volatile, "+"),
            _of(gpu.rows_remapped_uncorrected, gpu.rows_remapped_corrected, "+"),
            f"{_cell(gpu.pcie_generation)} x{_cell(gpu.pcie_width)}",
            _of(up, gpu.nvlinks),
        )
    return grid


def _burns(burns: tuple[Burn, ...]) -> Grid:
    grid = _grid("device", *(f"{name} {unit}" for name, unit in UNITS.items()), "products", "unequal", title="Burn-in")
    for burn in burns:
        rates = [f"{burn.rates[name]:.4g}" if name in burn.rates else "–" for name in UNITS]
        grid.add_row(f"{burn.device} {burn.model}", *rates, str(burn.rounds), str(burn.unequal))
    return grid


def _collectives(rows: tuple[Collective, ...]) -> Grid:
    names = ("ranks", "size (B)", "count", "type", "redop", "time (us)", "algbw (GB/s)", "busbw (GB/s)", "#wrong")
    grid = _grid("operation", *names, title="Collectives")
    for row in rows:
        if row.error:
            grid.add_row(row.operation, row.ranks, row.error)
            continue
        numbers = (f"{row.time_us:.1f}", f"{row.algbw:.2f}", f"{row.busbw:.2f}", str(row.wrong))
        grid.add_row(row.operation, row.ranks, str(row.size), str(row.count), row.type, row.redop, *numbers)
    return grid


def _grid(first: str, *others: str, title: str) -> Grid:
    grid = Grid(title=title, title_justify="left", box=None, pad_edge=False)
    grid.add_column(first)
    for name in others:
        grid.add_column(name, justify="right")
    return grid


def _cell(value: object) -> str:
    return "–" if value is None else str(value)


def _of(value: object, other: object, between: str = "/") -> str:
    return "–" if value is None else f"{value}{between}{_cell(other)}"
