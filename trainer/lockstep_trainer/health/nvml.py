"""The driver's management library, NVML, behind a port of one question at a time.

A question is the name of NVML's function without ``nvmlDeviceGet``, with the names of its arguments behind it:
``Temperature``, ``ClockInfo SM``, ``TotalEccErrors UNCORRECTED VOLATILE``, ``Field DEV_NVLINK_LINK_COUNT``. So
answers can be written down as a JSON object, by question, and replayed (``recorded``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from lockstep_trainer.errors import TrainerError
from lockstep_trainer.health.readings import GpuReadings, Xid

MAX_LINKS = 36
"""NVML_NVLINK_MAX_LINKS: an H100 has 18."""
NO_ANSWER = frozenset({"NotSupported", "FunctionNotFound", "NotFound", "NoPermission", "NoData"})
"""Codes by which this GPU, its driver or a container's rights have no answer: no sign of a fault."""
LOST = frozenset({"GpuIsLost", "ResetRequired", "NotFound", "GpuNotFound", "Unknown", "Timeout"})
"""Codes of the very first question by which the GPU can't be used. An answered GPU gives «NotFound» for links that it
does not have."""


class Refused(TrainerError):
    """NVML has no answer; ``code`` is the error's name without ``NVML_ERROR_``, as in ``GpuIsLost``."""

    def __init__(self, code: str, says: str = "") -> None:
        super().__init__(f"NVML: {says or code}")
        self.code = code


class Nvml(Protocol):
    """What is asked of NVML. Every method raises Refused."""

    def count(self) -> int:
        """GPUs, lost ones among them as long as the driver knows them."""

    def ask(self, gpu: int, question: str) -> Any:
        """The answer about one GPU: a number, a string, a list, or an object."""

    def listen(self) -> AbstractContextManager[XidEvents]:
        """Hears the driver's errors from here on."""


class XidEvents(Protocol):
    """Errors of the driver since ``listen``."""

    def heard(self) -> Sequence[Xid]:
        """All until now, without waiting."""


def read_gpus(nvml: Nvml) -> tuple[GpuReadings, ...]:
    """Every GPU that NVML sees; raises Refused where it sees none because there is no driver."""
    return tuple(read_gpu(nvml, index) for index in range(nvml.count()))


def read_gpu(nvml: Nvml, index: int) -> GpuReadings:
    """One GPU. What it does not answer stays None; one that does not even tell its UUID is lost."""
    unanswered: list[str] = []

    def ask(question: str) -> Any:
        try:
            return nvml.ask(index, question)
        except Refused as refused:
            if refused.code not in NO_ANSWER:
                unanswered.append(f"{question}: {refused.code}")
            return None

    def listed(question: str, count: int) -> Sequence[int | None]:
        answer = ask(question)
        return answer if isinstance(answer, Sequence) and len(answer) == count else [None] * count

    def member(question: str, name: str) -> Any:
        answer = ask(question)
        return answer.get(name) if isinstance(answer, dict) else None

    try:
        uuid = nvml.ask(index, "UUID")
    except Refused as refused:
        if refused.code in LOST:
            return GpuReadings(index, lost=refused.code)
        uuid = None
    remapped = listed("RemappedRows", 4)  # corrected, uncorrected, pending, failed
    total, links = ask("Field DEV_NVLINK_LINK_COUNT"), _links(ask)
    power, retired = ask("EnforcedPowerLimit"), ask("RetiredPagesPendingStatus")
    return GpuReadings(
        index=index,
        uuid=uuid or "",
        serial=str(ask("Serial") or ""),
        name=str(ask("Name") or ""),
        bus_id=str(member("PciInfo", "busId") or ""),
        driver=str(ask("DriverVersion") or ""),
        ecc_enabled=listed("EccMode", 2)[0],
        ecc_corrected_volatile=ask("TotalEccErrors CORRECTED VOLATILE"),
        ecc_corrected_aggregate=ask("TotalEccErrors CORRECTED AGGREGATE"),
        ecc_uncorrected_volatile=ask("TotalEccErrors UNCORRECTED VOLATILE"),
        ecc_uncorrected_aggregate=ask("TotalEccErrors UNCORRECTED AGGREGATE"),
        ecc_uncorrected_sram=ask("MemoryErrorCounter UNCORRECTED AGGREGATE SRAM"),
        rows_remapped_corrected=remapped[0],
        rows_remapped_uncorrected=remapped[1],
        remap_pending=remapped[2],
        remap_failed=remapped[3],
        banks_without_spares=member("RowRemapperHistogram", "none"),
        retired_pages_pending=retired,
        throttle=ask("CurrentClocksEventReasons"),
        clock_sm=ask("ClockInfo SM"),
        clock_sm_max=ask("MaxClockInfo SM"),
        clock_memory=ask("ClockInfo MEM"),
        clock_memory_max=ask("MaxClockInfo MEM"),
        temperature=ask("Temperature"),
        temperature_slowdown=ask("TemperatureThreshold SLOWDOWN"),
        temperature_memory=ask("Field DEV_MEMORY_TEMP"),
        power_limit=None if power is None else power / 1000,  # NVML tells mW
        memory_total=member("MemoryInfo", "total"),
        memory_used=member("MemoryInfo", "used"),
        pcie_generation=ask("CurrPcieLinkGeneration"),
        pcie_generation_max=ask("MaxPcieLinkGeneration"),
        pcie_width=ask("CurrPcieLinkWidth"),
        pcie_width_max=ask("MaxPcieLinkWidth"),
        pcie_replays=ask("PcieReplayCounter"),
        nvlinks=len(links) if links else total,
        nvlinks_down=links.count(0) if links else None,
        nvlink_crc_errors=ask("Field DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL"),
        nvlink_recovery_errors=ask("Field DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL"),
        recovery_action=ask("Field DEV_GET_GPU_RECOVERY_ACTION"),
        mig=listed("MigMode", 2)[0],
        unanswered=tuple(unanswered),
    )


def _links(ask: Callable[[str], Any]) -> list[int]:
    """State of each link, 1 active. Where link 0 is none the GPU has none, or its container may not see them."""
    states: list[int] = []
    for link in range(MAX_LINKS):
        state = ask(f"NvLinkState {link}")
        if state is None:
            break
        states.append(int(state))
    return states
