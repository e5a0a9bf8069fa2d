"""The same small matrix product and the same copy again and again: what a device is measured by, whatever it trains.

All ranks do it behind the same steps. So a rank whose own work takes long has been compared with the others when it is
asked why: a product that is slow too is its device's, a copy its memory's. A rank whose work is slow without either is
not called so.

It needs 150 MB of a GPU's memory, 2 MB on a CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from lockstep_trainer.injection.drag import Drag

EVERY = 8
"""Steps between turns: less than the search for slow ranks waits for an answer
(``lockstep_trainer.stragglers.settings.PATIENCE``)."""
_TURNS = 5
"""Measurements whose median counts."""
_QUEUE_CYCLES = 2**20
"""That a GPU spins before a turn, half a millisecond, while its host hands it the turn. One that had nothing to do
waited for its host between the beginning of a product and the product: on an H100 it took 87 µs (79–117) in place of
26, and what was measured was the host."""


class Yardstick:
    """Of one rank's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gpu = device.type == "cuda"
        size, elements = (2048, 2**25) if gpu else (128, 2**18)
        dtype = torch.bfloat16 if gpu else torch.float32
        # No random numbers: training's are not to be touched.
        self._matrix = torch.linspace(-1, 1, size * size, device=device).reshape(size, size).to(dtype)
        self._source = torch.zeros(elements, dtype=dtype, device=device)
        self._target = torch.empty_like(self._source)
        self._pending: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []
        self._seconds: tuple[float, float] | None = None
        self._alone: float | None = None
        """Seconds of a product that nothing was added to."""
        self.drag: Drag | None = None
        """Makes the product slower on purpose."""

    def due(self, step: int) -> bool:
        """Whether it is measured behind this step: the same ones on all ranks."""
        return step % EVERY == 0

    def measure(self) -> None:
        """One turn. A GPU does it behind what it has to do; nothing waits for it."""
        if self._device.type == "cuda":
            torch.cuda._sleep(_QUEUE_CYCLES)  # type: ignore[no-untyped-call]
            self._pending = [[self._events(body) for _ in range(_TURNS)] for body in self._bodies()]
            return
        product, copy = (statistics.median(_timed(body) for _ in range(_TURNS)) for body in self._bodies())
        self._seconds = (product, copy)

    def take(self) -> tuple[float, float] | None:
        """Seconds of the product and of the copy, once for each turn; None where there was none, or it is not done."""
        if self._pending and self._pending[-1][-1][1].query():  # type: ignore[no-untyped-call]
            product, copy = (
                statistics.median(begun.elapsed_time(ended) / 1000 for begun, ended in pairs) for pairs in self._pending
            )
            self._pending, self._seconds = [], (product, copy)
        seconds, self._seconds = self._seconds, None
        if seconds and (self.drag is None or self._alone is None):
            self._alone = seconds[0]
        return seconds

    def _bodies(self) -> tuple[Callable[[], object], Callable[[], object]]:
        return (self._product, lambda: self._target.copy_(self._source))

    def _product(self) -> None:
        torch.mm(self._matrix, self._matrix)
        if self.drag and self._alone is not None:
            self.drag.spin(self.drag.share * self._alone)

    def _events(self, body: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record()
        body()
        ended.record()
        return begun, ended


def _timed(body: Callable[[], object]) -> float:
    begun = time.perf_counter()
    body()
    return time.perf_counter() - begun
