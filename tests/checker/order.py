"""Which samples a step must consume: the published rule, written out one number at a time.

A rule is the ``sampler`` part of a manifest: seed, sizes of the sources, stages of the mix, samples per step.
"""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

_MASK = (1 << 64) - 1
_BLOCK = 4096
_TURNS = 6

Json = dict[str, Any]


def splitmix64(x: int) -> int:
    """One step of the SplitMix64 generator (Steele, Lea, Flood 2014) from state ``x``."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@cache
def key(*parts: int) -> int:
    """A key from numbers."""
    found = 0
    for part in parts:
        found = splitmix64(found ^ part)
    return found


def permuted(place: int, size: int, secret: int) -> int:
    """Where a permutation of ``range(size)`` sends ``place``: a Feistel network, walked until it lands inside."""
    half = 1
    while 4**half < size:
        half += 1
    low, keys = 2**half - 1, _keys(secret)
    while True:
        left, right = place >> half, place & low
        for each in keys:
            left, right = right, left ^ (splitmix64(right ^ each) & low)
        place = left << half | right
        if place < size:
            return place


@lru_cache(maxsize=64)
def _keys(secret: int) -> list[int]:
    return [splitmix64(secret ^ turn) for turn in range(_TURNS)]


class Order:
    """The order that a rule makes."""

    def __init__(self, rule: Json) -> None:
        self.seed: int = rule["seed"]
        self.sizes: list[int] = [source["samples"] for source in rule["sources"]]
        self.stages: list[tuple[int, list[float]]] = [(stage["first"], stage["weights"]) for stage in rule["stages"]]
        self.batches: list[tuple[int, int, int]] = [
            (piece["step"], piece["first"], piece["samples"]) for piece in rule["batches"]
        ]
        self._walk = lru_cache(maxsize=64)(self._walk_block)

    def indices(self, step: int) -> range:
        """Global indices of a step."""
        begin, first, samples = [piece for piece in self.batches if piece[0] <= step][-1]
        start = first + (step - begin) * samples
        return range(start, start + samples)

    def at(self, index: int) -> tuple[int, int]:
        """(source, sample) at a global index."""
        if not self.stages:
            number, place = divmod(index, sum(self.sizes))
            sample = permuted(place, sum(self.sizes), key(self.seed, 0, 0, number))
            ends = list(accumulate(self.sizes))
            source = bisect_right(ends, sample)
            return source, sample - (ends[source] - self.sizes[source])
        stage = max(n for n, (first, _) in enumerate(self.stages) if first <= index)
        block, place = divmod(index - self.stages[stage][0], _BLOCK)
        source = self._sources(stage, block)[place]
        draw = self._drawn_at(stage, block)[source] + self._sources(stage, block)[:place].count(source)
        number, place = divmod(draw, self.sizes[source])
        return source, permuted(place, self.sizes[source], key(self.seed, 0, source, number))

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """(source, sample) of every sample of a step, in order."""
        return [self.at(index) for index in self.indices(step)]

    def _sources(self, stage: int, block: int) -> list[int]:
        return self._walk(stage, block)[0]

    def _drawn_at(self, stage: int, block: int) -> list[int]:
        """Draws of each source before the first index of a block, counted block by block."""
        return self._walk(stage, block)[1]

    def _walk_block(self, stage: int, block: int) -> tuple[list[int], list[int]]:
        weights = self.stages[stage][1]
        before = _division(block * _BLOCK, weights)
        behind = _division((block + 1) * _BLOCK, weights)
        slots = [source for source in range(len(weights)) for _ in range(behind[source] - before[source])]
        secret = key(self.seed, 1, stage, block)
        sources = [slots[permuted(place, _BLOCK, secret)] for place in range(_BLOCK)]
        drawn = before
        if stage:  # what the stages before it drew: whole blocks, and the part of one that the border cut
            whole, part = divmod(self.stages[stage][0] - self.stages[stage - 1][0], _BLOCK)
            last, base = self._walk(stage - 1, whole)
            drawn = [a + b + last[:part].count(source) for source, (a, b) in enumerate(zip(drawn, base, strict=True))]
        return sources, drawn


def _division(count: int, weights: list[float]) -> list[int]:
    """``count`` draws divided by weight: each source in turn takes its share of what is left, rounded down."""
    shares, weight_left = [], sum((Fraction(weight) for weight in weights), Fraction(0))
    for weight in weights:
        shares.append(count * Fraction(weight) // weight_left if weight else 0)
        count -= shares[-1]
        weight_left -= Fraction(weight)
    return [int(share) for share in shares]
