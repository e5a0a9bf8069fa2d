"""Pauses of the whole job: now and then one rank stands still, and all wait for it, no rank more often than others."""

from __future__ import annotations

import math
from collections import Counter, deque

from lockstep_trainer.stragglers import settings
from lockstep_trainer.stragglers.history import Floats
from lockstep_trainer.stragglers.shifts import exponent

_WINDOWS = settings.WINDOWS[1:]
_NOW = 10
"""Steps that tell what is so now."""


class Pauses:
    """The longest pause of each step, and whose it was."""

    def __init__(self, event: float, loss: float) -> None:
        """Args: ``event``, share of a step's work from which a pause counts; ``loss``, mean share that must be lost."""
        self._event = event
        self._loss = loss
        self._known_slow: frozenset[int] = frozenset()
        self._steps: deque[tuple[float, int]] = deque(maxlen=settings.LONGEST)

    def add(self, shares: Floats, known_slow: frozenset[int]) -> None:
        """One step's shares of a step's work [ranks] that were paused; ranks known to be slow are left out."""
        if known_slow - self._known_slow:  # what it did before it was found was no pause either
            for at, (_, rank) in enumerate(self._steps):
                if rank in known_slow:
                    self._steps[at] = (0.0, -1)
        self._known_slow = known_slow
        longest, who = 0.0, -1
        for paused in (shares >= self._event).nonzero()[0].tolist():
            if paused not in known_slow and shares[paused] > longest:
                longest, who = float(shares[paused]), paused
        longest = min(longest, 1.0)
        self._steps.append((longest, who))

    def loss(self, last: int) -> float:
        """Mean share of a step that was lost over the last steps."""
        steps = list(self._steps)[-last:]
        return sum(longest for longest, _ in steps) / max(len(steps), 1)

    def over(self, last: int) -> bool:
        """Over the last steps less than half of what counts was lost; if so, it begins anew."""
        over = self.loss(last) < settings.OVER * self._loss
        if over:
            self._steps.clear()
        return over

    def frequent(self, ranks: int) -> int:
        """Shortest window over which pauses cost enough and fall on ranks as chance has it; 0 where none."""
        now = Counter(rank for _, rank in list(self._steps)[-_NOW:] if rank >= 0)
        if now and now.most_common(1)[0][1] > _NOW // 2:
            return 0  # one rank is late in most steps: these are no pauses, and it will be found or be over soon
        for window in _WINDOWS:
            steps = list(self._steps)[-window:]
            if len(steps) < window:
                return 0
            who = Counter(rank for _, rank in steps if rank >= 0)
            events = who.total()
            # Standard error of the loss, for events that come by chance.
            error = math.sqrt(sum(longest**2 for longest, _ in steps)) / window
            if events < settings.PAUSE_EVENTS or self.loss(window) < self._loss + settings.MARGIN * error:
                continue
            third = window // 3
            parts = (steps[:third], steps[third : 2 * third], steps[2 * third :])
            lasting = all(sum(longest for longest, _ in part) >= self._loss / 2 * len(part) for part in parts)
            most = who.most_common(1)[0][1]
            even = ranks == 1 or (len(who) > 1 and exponent(most, events / ranks) < settings.UNEVEN)
            if lasting and even:
                return window
        return 0
