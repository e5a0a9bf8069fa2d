"""Whose level is above its peers', and since when: moving sums over windows of several lengths.

A moving-sum test (MOSUM; Eichinger and Kirch, Bernoulli 2018) rather than Bayesian online change points as in
Greyhound: it needs no prior for the noise, which has heavy tails here, costs the same for each rank and step, and can
tell a burst from what lasts by looking at the thirds of its window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lockstep_trainer.stragglers import settings
from lockstep_trainer.stragglers.history import Floats, History, median
from lockstep_trainer.stragglers.layout import Indices

Test = Literal["mean", "events"]
"""How certainty is told: by the standard error of a mean, or by a count of what is rare, where most steps have none."""

_OF_DIFFERENCES = {1: 2.0, 2: 4.0, 3: 2.25}
"""Variance of a rank's distance from its healthy peers over that of its value, by ranks in the group: of two, each is
as far above their mean as the other is below. For more of them π/2 over their number is added, which is a median's.
One alone is compared with its own past, which is not known for certain either."""


@dataclass(frozen=True, slots=True)
class Shift:
    """A level above its peers'."""

    unit: int
    """Column of the history."""
    excess: float
    """How far above, in the history's unit."""
    window: int
    """Steps over which it was seen."""


def reference(levels: Floats, threshold: float, error: float = 0.0) -> float:
    """Level of the healthy ones among ``levels``, each with a standard error.

    The median, and where the lower quartile is far below it, that: half of a group may be slow, one of two for one.
    """
    if len(levels) == 1:
        return float(levels[0])
    ordered = np.sort(levels)
    low, middle = float(ordered[(len(levels) - 1) // 4]), median(levels)
    return low if middle - low > max(threshold / 4, 3 * error) else middle


def exponent(count: int, expected: float) -> float:
    """−ln of Chernoff's bound for ``count`` events or more where ``expected`` are."""
    if count <= expected:
        return 0.0
    return count * math.log(count / max(expected, 1e-12)) - count + expected


@dataclass(frozen=True, slots=True)
class Watch:
    """A history that is watched for units above their peers."""

    history: History
    """Values, 0 where a unit is as expected."""
    peers: tuple[Indices, ...]
    """Units that are compared with each other; one without peers is compared with 0, its own past."""
    threshold: float
    """What counts, in the history's unit."""
    test: Test = "mean"
    certain: float = settings.CERTAIN
    """Standard errors, for the test of the mean."""
    shortest: int = settings.WINDOWS[0]
    """Windows from this length on."""

    def shifts(self, blocked: frozenset[int]) -> list[Shift]:
        """Units above their peers now, ``blocked`` ones left out, each with the shortest window that shows it."""
        history, threshold = self.history, self.threshold
        found: dict[int, Shift] = {}
        for window in settings.WINDOWS:
            # longer windows change slowly, and need not be looked at in every step
            if window < self.shortest or window > history.count or history.steps % (window // settings.WINDOWS[0]):
                continue
            means = history.mean(window)
            if float(means.max(initial=-math.inf)) < settings.SUSPECT * threshold / 2:
                continue  # even with half of a group slow, and its middle between both halves, someone would be above
            for group in self.peers:
                base = self._base(means, group, window)
                for unit in group[means[group] - base >= settings.SUSPECT * threshold].tolist():
                    shift = Shift(unit, float(means[unit]) - base, window)
                    free = unit not in blocked and unit not in found
                    lasts = free and self._sure(shift, group) and self._lasts(history.rows(window)[:, unit] - base)
                    if lasts and self.began(shift) >= settings.WINDOWS[0]:
                        found[unit] = shift
        return list(found.values())

    def companions(self, found: list[Shift], units: Iterable[int]) -> list[Shift]:
        """Those of ``units`` that are above their peers, too, if not for certain: what slows one may slow its node."""
        known = {one.unit for one in found}
        window = settings.WINDOWS[0]
        levels = {unit: self.level(unit, window) for unit in units if unit not in known}
        enough = settings.PERSISTENT * self.threshold
        return [Shift(unit, excess, window) for unit, excess in levels.items() if excess >= enough]

    def level(self, unit: int, window: int) -> float:
        """How far the unit is above its peers over the last steps."""
        window = min(window, self.history.count)
        means = self.history.mean(window)
        return float(means[unit]) - self._base(means, self._group(unit), window)

    def over(self, units: frozenset[int], window: int) -> bool:
        """None of the units is above its peers any more."""
        return all(self.level(unit, window) < settings.OVER * self.threshold for unit in units)

    def began(self, shift: Shift) -> int:
        """Steps ago at which the level rose: the change point of greatest likelihood, for noise of constant variance.

        All the steps known where it has been so from the first of them.
        """
        bound = max(self.history.bound, shift.excess)
        values = np.clip(self._above_peers(shift), -bound, bound)
        known = len(values)
        after = np.cumsum(values[::-1])[:-1]  # sums of the last 1, 2, … steps
        count = np.arange(1, known)
        rise = after / count - (values.sum() - after) / (known - count)
        gain = rise * np.abs(rise) * count * (known - count)
        best = int(np.argmax(gain))
        return best + 1 if rise[best] >= shift.excess / 2 else known

    def size(self, shift: Shift) -> float:
        """How far the unit is above its peers: the median since it rose, where the clipped values' mean is less."""
        return max(median(self._above_peers(shift)[-self.began(shift) :]), shift.excess)

    def _above_peers(self, shift: Shift) -> Floats:
        """Values [steps known] over those of the unit's healthy peers."""
        rows, group = self.history.rows(self.history.count), self._group(shift.unit)
        values: Floats = rows[:, shift.unit]
        means = self.history.mean(shift.window)
        if len(group) > 1 and self._base(means, group, shift.window) < median(means[group]):
            values = values - np.sort(rows[:, group], axis=1)[:, (len(group) - 1) // 4]
        return values

    def _group(self, unit: int) -> Indices:
        return next(group for group in self.peers if unit in group)

    def _base(self, means: Floats, group: Indices, window: int) -> float:
        if len(group) == 1:
            return 0.0
        return reference(means[group], self.threshold, math.sqrt(median(self.history.variance[group]) / window))

    def _lasts(self, values: Floats) -> bool:
        """A level that lasts from the start of the window to its end, and no burst that is in it."""
        if self.test == "mean":
            enough = settings.PERSISTENT * self.threshold
            return all(np.sort(third)[(len(third) - 1) // 2] >= enough for third in np.array_split(values, 3))
        events = np.flatnonzero(values >= self.threshold / 2)
        if len(events) < 2:
            return False
        gap = (events[-1] - events[0]) / (len(events) - 1)
        quiet = max(int(events[0]), len(values) - 1 - int(events[-1]))
        return bool(quiet <= settings.QUIET_GAPS * gap)

    def _sure(self, shift: Shift, group: Indices) -> bool:
        others = group[group != shift.unit]
        if self.test == "mean":
            variance = self.history.variance
            pooled = median(variance[others]) if len(others) else 0.0
            noise = max(float(variance[shift.unit]), pooled) * _OF_DIFFERENCES.get(len(group), 1 + 1.6 / len(group))
            error = math.sqrt(noise / shift.window)
            return shift.excess >= max(
                self.certain * error, settings.SUSPECT * self.threshold + settings.MARGIN * error
            )
        events = self.history.rows(shift.window) >= self.threshold / 2
        healthy = float(events[:, others].mean()) if len(others) else 0.0
        expected = shift.window * max(healthy, settings.RARE)
        return exponent(int(events[:, shift.unit].sum()), expected) >= settings.UNLIKELY
