"""Axes: from data to pixels, round tick marks, and numbers as people write them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map of [low, high] onto pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (value - self.low) / (span or 1.0) * (self.end - self.start)


def ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Round numbers inside [low, high]: multiples of 1, 2 or 5 × 10ⁿ."""
    if not high > low:
        return [low]
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


def time_ticks(high: float, at_most: int = 9) -> list[float]:
    """Round times inside [0, high] seconds: steps that clocks have."""
    days = 86400 * max(1, math.ceil(high / 86400 / at_most))
    step = next((s for s in _TIME_STEPS if high / s <= at_most), days)
    return [float(index * step) for index in range(int(high // step) + 1)]


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 72:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(seconds: float) -> str:
    """An axis label: 0:45, 12:30, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short(value: float) -> str:
    """A number in at most three figures: 0.42, 1.5 k, 812 k, 3.2 M."""
    size = abs(value)
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= limit * 0.9995:
            return _three(value / limit) + unit
    return _three(value)


def _three(value: float) -> str:
    size = abs(value)
    digits = 0 if size >= 99.5 or value == round(value) else 1 if size >= 9.95 else 2
    return f"{value:.{digits}f}"


def size(num_bytes: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"
