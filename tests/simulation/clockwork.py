"""Virtual time and a network that misbehaves, from one seed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

START = 1_000_000.0  # Unix seconds; any


class Clockwork:
    """A queue of things to do, in order of virtual time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = START
        self.over = False
        """Nothing more is to be done."""
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._number = 0

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Do it so much later."""
        self._number += 1
        heapq.heappush(self._queue, (self.now + seconds, self._number, action))

    def between(self, least: float, most: float) -> float:
        """A time from the seed. (``uniform`` is the same and costs twice as much.)"""
        return least + (most - least) * self.random.random()

    def run(self, until: float) -> None:
        """Until a moment, or until all is over."""
        queue, pop = self._queue, heapq.heappop
        while queue and queue[0][0] <= until and not self.over:
            self.now, _, action = pop(queue)
            action()
        if not self.over:
            self.now = until


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
        draw = self._clockwork.random.random
        if self.faulty and draw() < 0.02:
            return 0.2 + 2.3 * draw()
        return 0.001 + 0.019 * draw()

    def send(self, source: str, target: str, deliver: Callable[[], object]) -> None:
        """Once, never, or twice, in any order."""
        copies = 1
        if self.faulty and (chance := self._clockwork.random.random()) < 0.04:
            copies = 0 if chance < 0.02 else 2

        def arrive() -> None:
            if not self.cut_off or self.reachable(source, target):
                deliver()

        for _ in range(copies):
            self._clockwork.after(self.delay(), arrive)
