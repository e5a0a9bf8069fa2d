"""Which sample stands at a global index: a pure function of the seed, the sizes of the sources and the mix.

Nothing is carried from index to index, and nothing as long as the data is held: 10⁹ samples cost what ten do. The order
is a contract (``docs/design/contracts.md``, The order of samples): a checker derives it without this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lockstep_trainer.errors import UserError

BLOCK = 4096
"""Indices in which a mix keeps its quotas: the share of a source is right to a sample at the end of each block."""

ROUNDS = 6  # of the Feistel network: Luby and Rackoff need 4 for an ideal round function; halves here may be one bit

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_PASS, _MIX = 0, 1  # what a key is for


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64 from each state ``x`` (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
    Generators, OOPSLA 2014); arithmetic modulo 2⁶⁴, vectorised."""
    z = x + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def key_of(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """A key from numbers, shape (1,), or keys from arrays of one length: each part is mixed into the hash of those
    before it."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix64(key ^ np.asarray(part).astype(np.uint64))
    return key


def permute(places: NDArray[np.int64], size: int | NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where permutations of 0 … size − 1 send ``places`` (n,); ``key`` chooses the permutation. ``size`` and ``key``
    are one for all places or one for each.

    A balanced Feistel network over an even number of bits, of which a place that lands at ``size`` or above takes
    another turn until it lands below (cycle walking; Black and Rogaway: Ciphers with Arbitrary Finite Domains,
    CT-RSA 2002, method 2). Its domain is less than four times ``size``, so four turns are taken on average at most.
    """
    sizes, keys = np.broadcast_to(size, places.shape), np.broadcast_to(key, places.shape)
    distinct, which = np.unique(sizes, return_inverse=True)
    halves = np.array([max(1, ((each - 1).bit_length() + 1) // 2) for each in distinct.tolist()], np.uint64)
    found, limits, shift = places.astype(np.uint64), sizes.astype(np.uint64), halves[which.reshape(sizes.shape)]
    mask = (np.uint64(1) << shift) - np.uint64(1)
    turns = np.stack([splitmix64(keys ^ np.uint64(turn)) for turn in range(ROUNDS)])
    todo = np.arange(len(found))
    while len(todo):
        left, right = found[todo] >> shift[todo], found[todo] & mask[todo]
        low = mask[todo]
        for turn in turns[:, todo]:
            left, right = right, left ^ (splitmix64(right ^ turn) & low)
        found[todo] = (left << shift[todo]) | right
        todo = todo[found[todo] >= limits[todo]]
    return found.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Stage:
    """A mix, from a global index on to the next stage."""

    first: int  # global index
    weights: tuple[float, ...]  # of each source; not all 0


@dataclass(frozen=True, slots=True)
class Draws:
    """What is consumed, in order; each field is (n,) int64."""

    index: NDArray[np.int64]  # global
    source: NDArray[np.int64]  # number of the source
    sample: NDArray[np.int64]  # id in its source

    def __len__(self) -> int:
        return len(self.index)

    def part(self, start: int, stop: int) -> Draws:
        """Those from ``start`` to ``stop``."""
        return Draws(self.index[start:stop], self.source[start:stop], self.sample[start:stop])


@dataclass(frozen=True)
class Mixture:
    """The order of all samples of a job.

    Without stages the sources are shuffled together: each pass over the data has every sample once. With stages,
    sources are drawn by weight and each runs through passes of its own.
    """

    seed: int
    sizes: tuple[int, ...]  # samples of each source
    stages: tuple[Stage, ...] = ()
    _offsets: NDArray[np.int64] = field(init=False, repr=False, compare=False)  # of the sources, shuffled together
    _before: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)  # draws before each stage

    def __post_init__(self) -> None:
        if not sum(self.sizes):
            raise UserError(
                "trainer.data: no source has a whole sample; add text, or lower trainer.data.sequenceLength"
            )
        object.__setattr__(self, "_offsets", np.cumsum([0, *self.sizes]))
        firsts = [stage.first for stage in self.stages]
        if firsts and (firsts[0] != 0 or sorted(set(firsts)) != firsts):
            raise ValueError(f"stages begin at {firsts}: the first must begin at 0, the others later and later")
        for stage in self.stages:
            for number, (weight, size) in enumerate(zip(stage.weights, self.sizes, strict=True)):
                if weight and not size:
                    raise UserError(
                        f"trainer.data.sources[{number}]: it has weight {weight} and not one whole sample; add text, "
                        "or lower trainer.data.sequenceLength"
                    )
        before = [(0,) * len(self.sizes)]
        for number, stage in enumerate(self.stages[1:]):
            begun = self.stages[number].first
            since = self._drawn_in_stage(number, stage.first - begun)
            before.append(tuple(a + b for a, b in zip(before[-1], since, strict=True)))
        object.__setattr__(self, "_before", tuple(before))

    def at(self, index: NDArray[np.int64]) -> Draws:
        """What stands at these global indices, (n,) int64."""
        if self.stages:
            source, number = self._by_quota(index)
        else:
            source, number = np.zeros(len(index), np.int64), index
        sizes = np.array(self.sizes)[source] if self.stages else self._offsets[-1:]
        passes, places = np.divmod(number, sizes)
        sample = permute(places, sizes, key_of(self.seed, _PASS, source, passes))
        if not self.stages:
            source = np.searchsorted(self._offsets, sample, side="right") - 1
            sample = sample - self._offsets[source]
        return Draws(index, source, sample)

    def drawn(self, index: int) -> tuple[int, ...]:
        """How many samples of each source stand before the global index ``index``; by weight only."""
        number = self._stage_of(index)
        since = self._drawn_in_stage(number, index - self.stages[number].first)
        return tuple(a + b for a, b in zip(self._before[number], since, strict=True))

    # ------------------------------------------------------------------------------------------------------------

    def _by_quota(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and number of the draw in its source, at these indices."""
        source, number = np.empty(len(index), np.int64), np.empty(len(index), np.int64)
        firsts = np.array([stage.first for stage in self.stages])
        stages = np.searchsorted(firsts, index, side="right") - 1
        blocks = (index - firsts[stages]) // BLOCK
        for stage, block in sorted(set(zip(stages.tolist(), blocks.tolist(), strict=True))):
            here = (stages == stage) & (blocks == block)
            places = index[here] - firsts[stage] - block * BLOCK
            sources, ranks = _block(self.seed, stage, block, self.stages[stage].weights)
            before = np.add(self._before[stage], quotas(self.stages[stage].weights, block * BLOCK))
            source[here] = sources[places]
            number[here] = before[sources[places]] + ranks[places]
        return source, number

    def _stage_of(self, index: int) -> int:
        return max(number for number, stage in enumerate(self.stages) if stage.first <= index)

    def _drawn_in_stage(self, number: int, count: int) -> tuple[int, ...]:
        """Draws of each source among the first ``count`` of a stage."""
        block, places = divmod(count, BLOCK)
        weights = self.stages[number].weights
        sources, _ = _block(self.seed, number, block, weights)
        more = np.bincount(sources[:places], minlength=len(weights)).tolist()
        return tuple(a + b for a, b in zip(quotas(weights, block * BLOCK), more, strict=True))


def quotas(weights: Sequence[float], count: int) -> tuple[int, ...]:
    """How ``count`` draws are divided among sources of these weights.

    Each source in turn takes its share of what is left, rounded down, and the last one the rest: the sum is exact, no
    share is off by more than the number of sources, and none falls when ``count`` grows. In exact arithmetic.
    """
    left, weight_left = count, sum(map(Fraction, weights), Fraction(0))
    shares = []
    for weight in map(Fraction, weights):
        share = left * weight // weight_left if weight else 0
        shares.append(int(share))
        left -= shares[-1]
        weight_left -= weight
    return tuple(shares)


@lru_cache(maxsize=8)  # a step may straddle two blocks, and a prefetch is one step ahead
def _block(
    seed: int, stage: int, block: int, weights: tuple[float, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source at each place of a block, and how many of the same source stand before it in the block; (BLOCK,) each."""
    before, behind = quotas(weights, block * BLOCK), quotas(weights, (block + 1) * BLOCK)
    counts = np.subtract(behind, before)
    slots = permute(np.arange(BLOCK), BLOCK, key_of(seed, _MIX, stage, block))
    sources = np.repeat(np.arange(len(weights)), counts)[slots]
    ranks = np.empty(BLOCK, np.int64)
    for each in np.flatnonzero(counts):
        here = sources == each
        ranks[here] = np.arange(counts[each])
    sources.setflags(write=False)
    ranks.setflags(write=False)
    return sources, ranks
