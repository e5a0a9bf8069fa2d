"""Clocks that add up the time between pairs of marks: of the host, or of a device without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Adds up the time between pairs of marks."""

    def mark(self) -> Any:
        """Now."""
        ...

    def add(self, begun: Any, ended: Any) -> None:
        """Count what lies between."""
        ...

    def take(self) -> float:
        """Seconds counted since the last call."""
        ...


class HostClock:
    """Wall time, where the host computes itself. It stands still while the host does (``hostpauses``)."""

    def __init__(self, stood: Callable[[], float] = lambda: 0.0) -> None:
        """``stood``: seconds until now that the host stood still."""
        self._stood = stood
        self._seconds = 0.0

    def mark(self) -> float:
        """Now."""
        return time.perf_counter() - self._stood()

    def add(self, begun: float, ended: float) -> None:
        """Count what lies between."""
        self._seconds += ended - begun

    def take(self) -> float:
        """Seconds counted since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class DeviceClock:
    """Time of the device, by events of the current stream; they are used again and again."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def mark(self) -> torch.cuda.Event:
        """When the device gets here."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, begun: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        """Count what lies between."""
        self._pairs.append((begun, ended))

    def take(self) -> float:
        """Seconds of the pairs that the device has passed; it is not waited for: the others come with the next call."""
        seconds = 0.0
        while self._pairs and self._pairs[0][1].query():  # type: ignore[no-untyped-call]
            begun, ended = self._pairs.popleft()
            seconds += begun.elapsed_time(ended) / 1000
            self._free += (begun, ended)
        return seconds


def clock_of(device: torch.device, stood: Callable[[], float] = lambda: 0.0) -> Clock:
    """A clock for what ``device`` does; ``stood`` as ``HostClock`` has it."""
    return HostClock(stood) if device.type == "cpu" else DeviceClock()


class Gaps:
    """What lies between the end of one piece of work and the beginning of the next."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ended: Any = None

    def begin(self) -> None:
        """A piece begins: the gap before it counts, if there is one."""
        ended, self._ended = self._ended, None
        if ended is not None:
            self._clock.add(ended, self._clock.mark())

    def end(self) -> None:
        """A piece ends."""
        self._ended = self._clock.mark()

    def drop(self) -> None:
        """Something else comes: this is no gap."""
        self._ended = None
