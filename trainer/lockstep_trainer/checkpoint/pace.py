"""How often snapshots are taken, where the job does not say."""

from __future__ import annotations

import math
from dataclasses import dataclass

STALL_SHARE = 0.01
"""Of the time: what snapshots may cost."""
BESIDE_SHARE = 0.1
"""What a second of copying beside training counts: it takes memory bandwidth, and on a CPU a core."""
SHORTEST = 2.0
"""Seconds between snapshots: to begin anew takes about as long as doing these steps again."""
FIRST = 10
"""Steps to the first snapshot, which measures what they cost."""
_MOST = 10_000


def interval(cost: float, step_seconds: float) -> int:
    """The smallest number of steps between snapshots at which ``cost`` (seconds of one, ``charged``) stays below
    STALL_SHARE and they are SHORTEST apart; FIRST where nothing was measured yet."""
    if cost <= 0 or step_seconds <= 0:
        return FIRST
    return min(_MOST, math.ceil(max(cost / STALL_SHARE, SHORTEST) / step_seconds))


def charged(blocked: float, whole: float) -> float:
    """What a snapshot costs, in seconds: those that training stood still, and a share of those of the copy."""
    return blocked + BESIDE_SHARE * max(0.0, whole - blocked)


@dataclass(slots=True)
class Pace:
    """The steps at which snapshots are due. All ranks feed it the same numbers, so they agree."""

    last: int  # step of the job
    durable: int | None  # steps between durable checkpoints; None: the leader chooses among the snapshots
    memory: int | None  # steps between snapshots; None: chosen here
    taken: int = 0  # step of the newest snapshot, or of the restored state
    chosen: int = FIRST
    """Steps between snapshots where ``memory`` is None."""
    asked: bool = False
    """Somebody wants one as soon as may be."""

    def due(self, step: int) -> bool:
        """Whether the state behind ``step`` is wanted; stays true until one is taken."""
        every = self.memory or self.chosen
        if step >= self.last or self.asked or step >= _next(self.taken, every):
            return True
        return self.durable is not None and step >= _next(self.taken, self.durable)

    def measured(self, cost: float, step_seconds: float) -> None:
        """What a snapshot costs and how long a step takes, means over the ranks."""
        self.chosen = interval(cost, step_seconds)

    def took(self, step: int) -> None:
        """There is one."""
        self.taken, self.asked = step, False


def _next(step: int, every: int) -> int:
    """The next multiple of ``every`` behind ``step``."""
    return (step // every + 1) * every
