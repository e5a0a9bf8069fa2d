"""Which GPU it is, with what software; and what NVML answers about it, written down for tests of the health checks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run(folder: Path) -> dict[str, Any]:
    """Facts, and ``nvml.json`` in ``folder``."""
    assert torch.cuda.is_available(), "there is no GPU here"
    begun = time.perf_counter()
    torch.zeros(1, device="cuda")
    context = time.perf_counter() - begun
    answers = nvml_answers()
    (folder / "nvml.json").write_text(json.dumps(answers, indent=1, default=str) + "\n")
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": str(torch.__version__),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "context_seconds": round(context, 2),
        "nvml_answers": len(answers),
    }


def nvml_answers() -> dict[str, Any]:
    """What each query that a health check may make is answered with, the refusals by name."""
    import pynvml as nvml  # type: ignore[import-not-found]  # in the package nvidia-ml-py

    nvml.nvmlInit()
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    queries: dict[str, Callable[[], Any]] = {"DriverVersion": nvml.nvmlSystemGetDriverVersion}
    without_arguments = (
        *("Name", "Serial", "UUID", "BoardPartNumber", "VbiosVersion", "PciInfo", "MemoryInfo", "UtilizationRates"),
        *("CurrPcieLinkGeneration", "MaxPcieLinkGeneration", "CurrPcieLinkWidth", "MaxPcieLinkWidth"),
        *("PcieReplayCounter", "PowerUsage", "EnforcedPowerLimit", "PerformanceState", "PersistenceMode"),
        *("CurrentClocksEventReasons", "SupportedClocksEventReasons", "EccMode", "RemappedRows", "MigMode"),
        *("RowRemapperHistogram", "RetiredPagesPendingStatus", "TotalEnergyConsumption", "NumGpuCores"),
        *("ComputeRunningProcesses", "SupportedEventTypes", "CudaComputeCapability", "GpuFabricInfo"),
    )
    for name in without_arguments:
        function = getattr(nvml, f"nvmlDeviceGet{name}", None)
        if function is not None:
            queries[name] = lambda function=function: function(gpu)
    for clock in ("GRAPHICS", "SM", "MEM"):
        kind = getattr(nvml, f"NVML_CLOCK_{clock}")
        queries[f"ClockInfo {clock}"] = lambda kind=kind: nvml.nvmlDeviceGetClockInfo(gpu, kind)
        queries[f"MaxClockInfo {clock}"] = lambda kind=kind: nvml.nvmlDeviceGetMaxClockInfo(gpu, kind)
    for error in ("CORRECTED", "UNCORRECTED"):
        for counter in ("VOLATILE", "AGGREGATE"):
            of = (getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{error}"), getattr(nvml, f"NVML_{counter}_ECC"))
            queries[f"TotalEccErrors {error} {counter}"] = lambda of=of: nvml.nvmlDeviceGetTotalEccErrors(gpu, *of)
    for name in ("SHUTDOWN", "SLOWDOWN", "MEM_MAX", "GPU_MAX"):
        limit = getattr(nvml, f"NVML_TEMPERATURE_THRESHOLD_{name}")
        queries[f"TemperatureThreshold {name}"] = lambda limit=limit: nvml.nvmlDeviceGetTemperatureThreshold(gpu, limit)
    queries["Temperature"] = lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)
    for link in (0, 17):
        queries[f"NvLinkState {link}"] = lambda link=link: nvml.nvmlDeviceGetNvLinkState(gpu, link)
    fields = ("DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL", "DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL", "DEV_MEMORY_TEMP")
    for name in fields:
        field = getattr(nvml, f"NVML_FI_{name}")
        queries[f"Field {name}"] = lambda field=field: _plain(nvml.nvmlDeviceGetFieldValues(gpu, [field])[0])
    answers: dict[str, Any] = {}
    for name, query in queries.items():
        try:
            answers[name] = _plain(query())
        except nvml.NVMLError as error:
            answers[name] = {"error": type(error).__name__, "says": str(error)}
        except Exception as error:  # a structure that this driver does not fill
            answers[name] = {"error": type(error).__name__, "says": str(error)[:200]}
    return answers


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if hasattr(value, "_fields_"):
        return {field[0]: _plain(getattr(value, field[0])) for field in value._fields_}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)
