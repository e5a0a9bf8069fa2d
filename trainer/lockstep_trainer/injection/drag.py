"""Work for nothing: how a rank is made slower on purpose, on its host or on its GPU."""

from __future__ import annotations

import statistics
import time
from collections import deque

import torch

_REMEMBERED = 5
"""Steps whose median tells how long the own work takes without the drag: single steps may be disturbed."""
_TRIAL_CYCLES = 20_000_000
"""Of a GPU's clock, some 10 ms, by which its rate is found."""


class Drag:
    """Makes the work of a device longer by ``share``: 0.3 is 30 %."""

    def __init__(self, device: torch.device, share: float) -> None:
        self.share = share
        self._device = device
        self._rate = _cycles_per_second(device) if device.type == "cuda" else 0.0
        self._clean: deque[float] = deque(maxlen=_REMEMBERED)
        self._added = 0.0

    def work(self) -> None:
        """What a step's own work is made longer by; nothing before the first one was measured."""
        self._added = self.share * statistics.median(self._clean) if self._clean else 0.0
        self.spin(self._added)

    def measured(self, seconds: float) -> None:
        """The own work of the step took so long, the drag included."""
        self._clean.append(max(0.0, seconds - self._added))

    def spin(self, seconds: float) -> None:
        """Keep the device busy: the host now, a GPU once it gets here in its stream."""
        if self._device.type == "cuda":
            torch.cuda._sleep(int(seconds * self._rate))  # type: ignore[no-untyped-call]
            return
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass


def _cycles_per_second(device: torch.device) -> float:
    """Waits for the GPU, once."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        begun.record()
        torch.cuda._sleep(_TRIAL_CYCLES)  # type: ignore[no-untyped-call]
        ended.record()
        ended.synchronize()
    milliseconds: float = begun.elapsed_time(ended)
    return _TRIAL_CYCLES / milliseconds * 1000
