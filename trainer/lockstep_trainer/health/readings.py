"""What is read off a node, as plain data. A value that the hardware or its driver does not tell is None."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GpuReadings:
    """One GPU, as NVML describes it."""

    index: int
    lost: str = ""  # why it answers nothing at all: GpuIsLost, NotFound, ResetRequired, Unknown …
    uuid: str = ""
    serial: str = ""
    name: str = ""
    bus_id: str = ""
    driver: str = ""

    ecc_enabled: int | None = None  # 1 or 0
    ecc_corrected_volatile: int | None = None  # errors since the driver was loaded
    ecc_corrected_aggregate: int | None = None  # errors in the life of the GPU
    ecc_uncorrected_volatile: int | None = None
    ecc_uncorrected_aggregate: int | None = None
    ecc_uncorrected_sram: int | None = None  # in its life, of caches and registers: those can't be remapped
    rows_remapped_corrected: int | None = None  # rows of memory replaced by spare ones, after many corrected errors
    rows_remapped_uncorrected: int | None = None  # after an uncorrected one
    remap_pending: int | None = None  # 1: a row is to be replaced at the next reset
    remap_failed: int | None = None  # 1: there was no spare row
    banks_without_spares: int | None = None
    retired_pages_pending: int | None = None  # 1: before Ampere, where pages are retired instead of rows remapped

    throttle: int | None = None  # bits of NVML's clocks event reasons
    clock_sm: int | None = None  # MHz
    clock_sm_max: int | None = None
    clock_memory: int | None = None
    clock_memory_max: int | None = None
    temperature: int | None = None  # °C
    temperature_slowdown: int | None = None  # °C at which the GPU slows itself down
    temperature_memory: int | None = None
    power_limit: float | None = None  # W
    memory_total: int | None = None  # bytes
    memory_used: int | None = None

    pcie_generation: int | None = None
    pcie_generation_max: int | None = None  # that GPU and slot can do
    pcie_width: int | None = None  # lanes
    pcie_width_max: int | None = None
    pcie_replays: int | None = None  # packets sent again since the driver was loaded

    nvlinks: int | None = None  # links that exist
    nvlinks_down: int | None = None  # of these, not active
    nvlink_crc_errors: int | None = None  # since the driver was loaded
    nvlink_recovery_errors: int | None = None
    recovery_action: int | None = None  # what the driver asks for: 0 nothing, 1 reset, 2 reboot …
    mig: int | None = None  # 1: split into partitions

    unanswered: tuple[str, ...] = ()  # questions that should have an answer and got an error: «Temperature: Unknown»

    def named(self) -> str:
        """For people: index, serial and UUID as far as they are known."""
        known = [f"serial {self.serial}" if self.serial else "", self.uuid]
        return f"GPU {self.index}" + (f" ({', '.join(filter(None, known))})" if any(known) else "")


@dataclass(frozen=True, slots=True)
class Xid:
    """An error that the driver reported while somebody listened."""

    gpu: int | None  # index; None: the driver did not say
    code: int


@dataclass(frozen=True, slots=True)
class HostReadings:
    """The machine, as far as the container sees it."""

    shm_total: int | None = None  # bytes of /dev/shm
    shm_free: int | None = None
    run_free: int | None = None  # bytes free where snapshots and step records are kept
    open_files: int | None = None  # the soft limit of open file descriptors
    memory_available: int | None = None  # bytes, the smaller of the machine's and the container's
    clock_synchronized: int | None = None  # 1: the kernel's clock follows a time server
    clock_error_ms: float | None = None  # by how much it may be off, says whoever sets it
    driver: str = ""  # why NVML can't be asked: LibraryNotFound, DriverNotLoaded …; empty where it can
    gpus: int | None = None  # that NVML sees
    gpus_missing: int | None = None  # how many fewer than the pod was given


@dataclass(frozen=True, slots=True)
class Readings:
    """One node."""

    host: HostReadings = field(default_factory=HostReadings)
    gpus: tuple[GpuReadings, ...] = ()
    xids: tuple[Xid, ...] = ()
