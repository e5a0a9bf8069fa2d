"""Whether something grows: a slope over many processes, and how sure it is.

Faults end processes, so no one of them tells the whole story. The slope is one for all processes of a part, each with a
level of its own (least squares within the processes): with t and y the time and the value of a reading, and t̄ and ȳ
their means over the process,

    slope = Σ (t − t̄)(y − ȳ) / Σ (t − t̄)²

over all processes and readings. What a process does when it is young, filling caches and importing modules, is left
out. Readings near in time resemble each other, which would make the result look surer than it is; so they are first
averaged over blocks of time, and the blocks are the readings. The uncertainty is two standard errors,
2 √(s² / Σ (t − t̄)²), s² the squared residuals over (blocks − processes − 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from statistics import fmean

TEN_MINUTES = 600.0
Points = Sequence[tuple[float, float]]
"""(seconds, value) of one process, by time."""


class Growth(StrEnum):
    """What a slope says beside its limit."""

    NONE = "flat"
    """The slope with its uncertainty is below the limit."""
    GROWS = "grows"
    """The slope without its uncertainty is above it."""
    UNKNOWN = "undecided"
    """Neither: too short or too restless."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth per ten minutes."""

    per_ten_minutes: float
    uncertainty: float  # two standard errors
    processes: int  # that lived long enough
    blocks: int
    longest: float  # seconds over which one process was followed

    def beside(self, limit: float) -> Growth:
        """What it says of a limit per ten minutes."""
        if self.per_ten_minutes + self.uncertainty < limit:
            return Growth.NONE
        return Growth.GROWS if self.per_ten_minutes - self.uncertainty > limit else Growth.UNKNOWN


def slope(processes: Mapping[str, Points], *, warm_up: float, block: float) -> Slope | None:
    """The common slope. ``warm_up``: seconds of each process that are left out; ``block``: seconds that are averaged.
    None where no process was followed over three blocks beyond its warm-up."""
    lines = [list(_blocks(points, warm_up, block)) for points in processes.values()]
    lines = [line for line in lines if len(line) >= 3]
    count = sum(map(len, lines))
    if not lines or count - len(lines) - 1 < 1:
        return None
    centred = [(t, y) for line in lines for t, y in _centred(line)]
    spread = sum(t * t for t, _ in centred)
    rate = sum(t * y for t, y in centred) / spread
    residual = sum((y - rate * t) ** 2 for t, y in centred) / (count - len(lines) - 1)
    longest = max(line[-1][0] - line[0][0] for line in lines)
    uncertainty = 2 * math.sqrt(residual / spread)
    return Slope(rate * TEN_MINUTES, uncertainty * TEN_MINUTES, len(lines), count, longest)


def _blocks(points: Points, warm_up: float, block: float) -> Iterable[tuple[float, float]]:
    if not points:
        return
    begins = points[0][0] + warm_up
    late = [(t, y) for t, y in points if t >= begins]
    for _, group in groupby(late, key=lambda point: int((point[0] - begins) / block)):
        inside = list(group)
        yield fmean(t for t, _ in inside), fmean(y for _, y in inside)


def _centred(line: Points) -> Iterable[tuple[float, float]]:
    middle, level = fmean(t for t, _ in line), fmean(y for _, y in line)
    return ((t - middle, y - level) for t, y in line)
