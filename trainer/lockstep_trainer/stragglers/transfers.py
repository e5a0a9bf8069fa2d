"""How long each group's transfers take: the least that any of its ranks spent in the collective."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lockstep_trainer.stragglers.history import Floats, History
from lockstep_trainer.stragglers.layout import Indices, Layout
from lockstep_trainer.stragglers.settings import LONGEST, Settings
from lockstep_trainer.stragglers.work import Work

_LEAST = 1e-6
"""Seconds below which a transfer is none."""
_LIKE = 4
"""Groups of one kind from which one of them can be told to have been slow from the start."""


class Transfers:
    """Logarithm of each group's transfer over its usual one, 0 where it is usual."""

    def __init__(self, layout: Layout, user: Settings) -> None:
        self.layout = layout
        self.history = History(len(layout.groups), 3 * user.logarithm)
        self.alone: tuple[Indices, ...] = tuple(np.array([at]) for at in range(len(layout.groups)))
        """Each group is compared with its own past."""
        self._threshold = user.logarithm
        self._raw = np.full((LONGEST, len(layout.groups)), np.nan, dtype=np.float32)
        self._usual = np.full(len(layout.groups), np.nan)
        self._steps = 0
        self._unlike: set[int] = set()
        kinds: dict[tuple[str, int], list[int]] = defaultdict(list)
        self._order: dict[str, tuple[Indices, Indices, Indices]] = {}
        members: dict[str, list[int]] = defaultdict(list)
        for at, group in enumerate(layout.groups):
            kinds[group.dimension, group.stage].append(at)
            members[group.dimension].append(at)
        self._kinds = [np.array(alike) for alike in kinds.values() if len(alike) >= _LIKE]
        for dimension, numbers in members.items():
            sizes = [len(layout.groups[at].members) for at in numbers]
            ranks = np.concatenate([layout.groups[at].members for at in numbers])
            self._order[dimension] = (np.array(numbers), ranks, np.cumsum([0, *sizes[:-1]]))

    def add(self, work: Sequence[Work]) -> None:
        """One step. A group of which a rank is missing is left out: the missing one may have come last."""
        if not self.layout.groups:
            return
        row = self._raw[self._steps % LONGEST]
        row[:] = np.nan
        for dimension, (groups, ranks, starts) in self._order.items():
            waited = np.full(len(self.layout.places), np.nan)
            for one in work:
                at = self.layout.index.get(one.rank)
                if at is not None and dimension in one.waited:
                    waited[at] = one.waited[dimension]
            row[groups] = np.minimum.reduceat(waited[ranks], starts)
        self._steps += 1
        if self.history.count:
            self.history.append(self._shares(row))

    def calibrate(self, frozen: frozenset[int]) -> None:
        """What is usual, anew from the steps known; ``frozen`` groups keep theirs."""
        if not self.layout.groups:
            return
        rows = self._rows()
        logs = np.log(np.maximum(rows, _LEAST))
        known: NDArray[np.bool_] = np.asarray(np.isfinite(logs).any(axis=0))
        middle = np.full(rows.shape[1], np.nan)
        middle[known] = np.nanmedian(logs[:, known], axis=0)
        for alike in self._kinds:
            ordinary = float(np.median(middle[alike][known[alike]])) if known[alike].any() else np.nan
            for at in alike:
                if int(at) not in self._unlike and middle[at] > ordinary + self._threshold / 2:
                    middle[at] = ordinary
        keep = np.isin(np.arange(len(middle)), list(frozen)) & np.isfinite(self._usual)
        self._usual = np.where(keep | ~known, self._usual, middle)
        self.history.rebuild(np.array([self._shares(row) for row in rows]))

    def accept(self, groups: Sequence[int]) -> None:
        """No probe found these slow: they are slower than their like by nature."""
        self._unlike.update(groups)

    def correct(self, groups: Sequence[int], excess: float) -> None:
        """These were slow by ``excess``, a logarithm, in all that is known: their usual is less."""
        self._usual[list(groups)] -= excess
        self.history.rebuild(np.array([self._shares(row) for row in self._rows()]))

    def seconds(self, group: int, last: int) -> float:
        """Median seconds of the group's transfer over the last steps; 0 where it is not known."""
        column = self._rows()[-last:, group]
        known = column[np.isfinite(column)]
        return float(np.median(known)) if len(known) else 0.0

    def _rows(self) -> Floats:
        last = min(self._steps, LONGEST)
        return self._raw[[step % LONGEST for step in range(self._steps - last, self._steps)]].astype(float)

    def _shares(self, row: Floats) -> Floats:
        shares: Floats = np.log(np.maximum(row.astype(float), _LEAST)) - self._usual
        return shares
