"""The checks of a tier, in order. They run in a process of their own: a GPU in a bad state may hold a call for ever."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lockstep_trainer.health import load
from lockstep_trainer.health.classify import Finding, classify, worst_first
from lockstep_trainer.health.host import read_host
from lockstep_trainer.health.measured import Burn, Collective, of_burns, of_collectives
from lockstep_trainer.health.nvml import Nvml, Refused, XidEvents, read_gpus
from lockstep_trainer.health.readings import GpuReadings, HostReadings, Readings
from lockstep_trainer.health.recorded import RecordedNvml
from lockstep_trainer.health.table import Severity, Table

ANSWERS_VARIABLE = "LOCKSTEP_NVML_ANSWERS"
"""A file of recorded answers that takes the place of NVML."""


class Tier(StrEnum):
    """How much is done."""

    QUICK = "Quick"
    """What NVML and the host tell: under a second."""
    FULL = "Full"
    """And GPUs and links under load: a minute."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was read, measured and found."""

    tier: Tier
    node: str
    readings: Readings
    findings: tuple[Finding, ...]
    burns: tuple[Burn, ...] = ()
    collectives: tuple[Collective, ...] = ()

    @property
    def fatal(self) -> tuple[Finding, ...]:
        """Those for which the node must not get work."""
        return tuple(one for one in self.findings if one.severity is Severity.FATAL)

    def to_json(self) -> dict[str, Any]:
        """As an object of plain values; each finding also in words, as ``text``."""
        plain = dataclasses.asdict(self)
        plain["findings"] = [{**dataclasses.asdict(one), "text": str(one)} for one in self.findings]
        return plain


def check(
    tier: Tier, table: Table, *, run_dir: Path | None, gpus: int | None = None, env: Mapping[str, str] = os.environ
) -> Report:
    """Do it. ``gpus``: how many the pod was given. A node at fault already is spared the load. Raises UserError where
    the recorded answers can't be read."""
    nvml = open_nvml(env)
    readings = _read(nvml, run_dir, gpus)
    node, findings = env.get("LOCKSTEP_NODE_NAME", ""), classify(readings, table)
    quick = Report(tier, node, readings, findings)
    if tier is Tier.QUICK or quick.fatal:
        return quick
    # Recorded GPUs are not there to be loaded.
    count = len(readings.gpus) if not env.get(ANSWERS_VARIABLE) else 0
    with _listening(nvml) as events:
        burns = load.burn_in(count)
        rows = load.collectives(count, ranks=gpus)
        heard = tuple(events.heard()) if events else ()
    # Load brings out what idleness hides: errors of memory, heat, Xids.
    readings = dataclasses.replace(_read(nvml, run_dir, gpus), xids=heard)
    found = [*classify(readings, table), *of_burns(burns, readings.gpus, table)]
    found += of_collectives(rows, burns[0].model, table)
    return Report(tier, node, readings, worst_first(found), tuple(burns), tuple(rows))


def _read(nvml: Nvml | str, run_dir: Path | None, given: int | None) -> Readings:
    read: tuple[GpuReadings, ...] = ()
    driver = nvml if isinstance(nvml, str) else ""
    if not isinstance(nvml, str):
        try:
            read = read_gpus(nvml)
        except Refused as refused:
            driver = refused.code
    return Readings(_with_gpus(read_host(run_dir), read, driver, given), read)


@contextmanager
def _listening(nvml: Nvml | str) -> Iterator[XidEvents | None]:
    """To the driver's errors, where it tells them: virtual machines and old drivers may not."""
    with ExitStack() as stack:
        events = None
        if not isinstance(nvml, str):
            with suppress(Refused):
                events = stack.enter_context(nvml.listen())
        yield events


def open_nvml(env: Mapping[str, str]) -> Nvml | str:
    """NVML, or why there is none."""
    if answers := env.get(ANSWERS_VARIABLE):
        return RecordedNvml.read(Path(answers))
    from lockstep_trainer.health.driver import DriverNvml

    try:
        return DriverNvml()
    except Refused as refused:
        return refused.code


def _with_gpus(host: HostReadings, read: tuple[GpuReadings, ...], driver: str, given: int | None) -> HostReadings:
    """GPUs that are there beside those that were given. Partitions of one GPU are not counted: NVML shows the whole."""
    missing = None
    if given is not None and read and not any(gpu.mig for gpu in read):
        missing = max(0, given - len(read))
    return dataclasses.replace(host, driver=driver, gpus=len(read), gpus_missing=missing)
