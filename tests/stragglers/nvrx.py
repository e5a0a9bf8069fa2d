"""The rule that NVIDIA's Resiliency Extension publishes for sections, as a peer on the same traces.

Relative performance of a rank in a section: the least median over ranks ÷ its own median; below 0.75 it is a straggler.
It reports every 300 s, over what was measured since the last report: ``EVERY`` steps of 10 s, which is what large jobs
take. The section is a rank's own work, compute, data and host together; waiting for others is left out, which is in its
favour: a section with collectives in it is as long on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from lockstep_trainer.stragglers.work import Place, Work

FLAGGED_BELOW = 0.75
EVERY = 30
"""300 s at 10 s a step."""


class Report:
    """Its rule, report after report."""

    def __init__(self, places: Sequence[Place], every: int = EVERY) -> None:
        self._ranks = frozenset(place.rank for place in places)
        self._every = every
        self._steps = 0
        self._seconds: dict[int, list[float]] = defaultdict(list)

    def step(self, work: Sequence[Work]) -> frozenset[int]:
        """One step; ranks flagged by the report that is due after it."""
        for one in work:
            if one.rank in self._ranks:
                self._seconds[one.rank].append(one.compute + one.data + one.host)
        self._steps += 1
        if self._steps % self._every:
            return frozenset()
        medians = {rank: float(np.median(seconds)) for rank, seconds in self._seconds.items()}
        self._seconds.clear()
        least = min(medians.values(), default=0.0)
        return frozenset(rank for rank, median in medians.items() if least < FLAGGED_BELOW * median)
