"""Which GPU it is, with what software; and what NVML answers about it, written down for tests of the health checks."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lockstep_trainer.health.nvml import Nvml, Refused, read_gpu

FURTHER = (
    *("BoardPartNumber", "VbiosVersion", "UtilizationRates", "PowerUsage", "PerformanceState", "PersistenceMode"),
    *("SupportedClocksEventReasons", "TotalEnergyConsumption", "NumGpuCores", "SupportedEventTypes"),
    *("CudaComputeCapability", "ClockInfo GRAPHICS", "TemperatureThreshold SHUTDOWN", "TemperatureThreshold MEM_MAX"),
)
"""Questions that no row of the table needs yet."""


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
    """What each question that a health check asks is answered with, the refusals by name; and a few more."""
    from lockstep_trainer.health.driver import DriverNvml

    recorder = _Recorder(DriverNvml())
    read_gpu(recorder, 0)
    for question in FURTHER:
        with suppress(Refused):
            recorder.ask(0, question)
    return recorder.answers


class _Recorder:
    """Hands questions on and keeps the answers."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self.answers: dict[str, Any] = {}
        self.count, self.listen = nvml.count, nvml.listen

    def ask(self, gpu: int, question: str) -> Any:
        try:
            self.answers[question] = self._nvml.ask(gpu, question)
        except Refused as refused:
            self.answers[question] = {"error": f"NVMLError_{refused.code}", "says": str(refused)}
            raise
        return self.answers[question]
