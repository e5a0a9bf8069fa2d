"""Virtual time and a network that misbehaves, from one seed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from itertools import count

START = 1_000_000.0  # Unix seconds; any


class Clockwork:
    """A queue of things to do, in order of virtual time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = START
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do it so much later."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._numbers), action))

    def run(self, until: float, done: Callable[[], bool]) -> None:
        """Until a moment, or until ``done``."""
        while self._queue and self._queue[0][0] <= until and not done():
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = max(self.now, min(until, self._queue[0][0] if self._queue else until))


class Network:
    """Delivers, or not. Pods and operator are known by name."""

    def __init__(self, clockwork: Clockwork) -> None:
        self._clockwork = clockwork
        self.cut_off: set[str] = set()
        self.faulty = True

    def reachable(self, one: str, other: str) -> bool:
        """No partition between them."""
        return one == other or not (one in self.cut_off or other in self.cut_off)

    def delay(self) -> float:
        """Seconds that a message takes: mostly milliseconds, now and then as long as a hiccup."""
        draw = self._clockwork.random
        if self.faulty and draw.random() < 0.02:
            return draw.uniform(0.2, 2.5)
        return draw.uniform(0.001, 0.02)

    def send(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """Once, never, or twice, in any order."""
        draw = self._clockwork.random
        copies = 1
        if self.faulty:
            chance = draw.random()
            copies = 0 if chance < 0.02 else 2 if chance < 0.04 else 1
        for _ in range(copies):
            self._clockwork.after(self.delay(), lambda: self.reachable(source, target) and deliver())
