"""The last steps of one quantity for many ranks, and its mean over any window at the cost of one subtraction."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lockstep_trainer.stragglers.settings import LONGEST, WINDOWS

Floats: TypeAlias = NDArray[np.float64]

_NOISE_STEPS = 40
"""Steps over which the noise is averaged."""
_BOUND_STEPS = 20
"""Steps after which the bound of what is clipped follows the noise."""


def median(values: Floats) -> float:
    """The median of the values [n] that are known, 0 where none is; several times faster than numpy's for few."""
    ordered = np.sort(values)  # NaN last
    count = len(ordered) - int(np.count_nonzero(np.isnan(ordered)))
    if not count:
        return 0.0
    return float(ordered[count // 2] + ordered[(count - 1) // 2]) / 2


class History:
    """Values of ``units`` ranks (or groups, or stages) over the last ``LONGEST`` steps.

    Means are of clipped values, so that a single bad step cannot make a level; the noise is taken from differences of
    neighbouring steps, so that a shift does not count as noise.
    """

    def __init__(self, units: int, clip: float) -> None:
        self.units = units
        self.count = 0
        """Steps known, at most ``LONGEST``."""
        self._clip = clip
        self._values = np.zeros((LONGEST, units))
        self._sums = np.zeros((LONGEST + 1, units))
        self._at = 0  # steps ever appended: row t is at t % LONGEST, the sum before it at t % (LONGEST + 1)
        self._variance = np.zeros(units)
        self._before: Floats | None = None
        self.bound = clip
        """Values beyond it are clipped."""

    def append(self, row: Floats) -> None:
        """One step; NaN is a value that is not known, and changes no level."""
        missing = np.isnan(row)
        if missing.any():
            row = np.where(missing, self.mean(min(self.count, WINDOWS[0])) if self.count else 0.0, row)
        if self._at % _BOUND_STEPS == 0:
            self.bound = self._bounded()
        clipped = np.minimum(np.maximum(row, -self.bound), self.bound)
        if self._before is not None:
            step = ((clipped - self._before) ** 2 / 2 - self._variance) / min(self._at, _NOISE_STEPS)
            self._variance += np.where(missing, 0.0, step)
        self._before = clipped
        self._values[self._at % LONGEST] = row
        self._sums[(self._at + 1) % (LONGEST + 1)] = self._sums[self._at % (LONGEST + 1)] + clipped
        self._at += 1
        self.count = min(self.count + 1, LONGEST)

    def rebuild(self, rows: Floats) -> None:
        """Everything anew, with the rows [steps, units] of the steps known, oldest first, ``LONGEST`` at most."""
        missing = np.isnan(rows)
        usual = np.where(missing, 0.0, rows).sum(axis=0) / np.maximum((~missing).sum(axis=0), 1)
        rows = np.where(missing, usual, rows)
        self.bound = self._bounded()
        clipped = np.clip(rows, -self.bound, self.bound)
        self.count = self._at = len(rows)
        self._values[: self._at] = rows
        self._sums[0] = 0.0
        self._sums[1 : self._at + 1] = np.cumsum(clipped, axis=0)
        self._before = clipped[-1]
        if self._at > 1:
            weights = (1 - 1 / _NOISE_STEPS) ** np.arange(self._at - 2, -1, -1)
            self._variance = weights @ (np.diff(clipped, axis=0) ** 2 / 2) / weights.sum()

    def _bounded(self) -> float:
        return max(self._clip, 4 * math.sqrt(median(self._variance)))

    def mean(self, last: int, before: int = 0) -> Floats:
        """Means [units] over ``last`` steps that ended ``before`` steps ago.

        Raises:
            ValueError: more steps than are known.
        """
        if not 0 < last + before <= self.count:
            raise ValueError(f"last: {last} steps that ended {before} ago are more than the {self.count} known")
        end, start = self._at - before, self._at - before - last
        difference: Floats = (self._sums[end % (LONGEST + 1)] - self._sums[start % (LONGEST + 1)]) / last
        return difference

    def rows(self, last: int) -> Floats:
        """Values [last, units], oldest first."""
        return self._values[[step % LONGEST for step in range(self._at - last, self._at)]]

    @property
    def steps(self) -> int:
        """Steps ever appended."""
        return self._at

    @property
    def variance(self) -> Floats:
        """Variance [units] of one step's value around its level."""
        return self._variance

    def forget(self, unit: int) -> None:
        """The unit is another one from now on, as its rank is on another node: nothing is held against it."""
        self._values[:, unit] = 0.0
        self._sums[:, unit] = 0.0
        self._variance[unit] = median(self._variance)
