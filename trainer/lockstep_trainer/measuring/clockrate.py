"""The clock that a rank's GPU runs at, as the driver tells it: a device at a low one is slow for heat or power.

A thread asks once a second. The driver may be slow to answer, and for a GPU in a bad state may never do so: training
waits for neither. A GPU that is divided into partitions is not asked, nor one that the driver does not show.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping

import torch

from lockstep_trainer.health.nvml import Nvml, Refused

_EVERY = 1.0
"""Seconds between questions."""


class ClockRate:
    """Asks until it is closed."""

    def __init__(self, ask: Callable[[], float | None]) -> None:
        """``ask`` gives MHz, or None where there is no answer and will be none: then nobody asks again."""
        self._ask = ask
        self._newest: float | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)

    @classmethod
    def of(cls, device: torch.device, env: Mapping[str, str] = os.environ) -> ClockRate | None:
        """Of a GPU; None for anything else."""
        if device.type != "cuda":
            return None
        from lockstep_trainer.health.preflight import open_nvml

        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return cls(asking(lambda: open_nvml(env), uuid))

    def begin(self) -> None:
        """From now on."""
        self._thread.start()

    def close(self) -> None:
        """Ask no more. An answer under way is not waited for."""
        self._ending.set()

    def newest(self) -> float | None:
        """MHz, not much more than a second old; None before the first answer, and where there is none."""
        return self._newest

    def _run(self) -> None:
        while not self._ending.is_set():
            self._newest = self._ask()
            if self._newest is None:
                return
            self._ending.wait(_EVERY)


def asking(opened: Callable[[], Nvml | str], uuid: str) -> Callable[[], float | None]:
    """Asks for the clock of the multiprocessors of the GPU whose UUID ends with ``uuid``: torch leaves out what NVML
    puts before it. ``opened`` gives NVML, or why there is none; it is called with the first question."""
    found: list[tuple[Nvml, int]] = []

    def ask() -> float | None:
        try:
            if not found:
                nvml = opened()
                if isinstance(nvml, str):
                    return None
                index = next(at for at in range(nvml.count()) if str(nvml.ask(at, "UUID")).endswith(uuid))
                found.append((nvml, index))
            nvml, index = found[0]
            return float(nvml.ask(index, "ClockInfo SM"))
        except (Refused, StopIteration):
            return None

    return ask
