"""Which samples a step consumes: a pure function of the seed and the global sample index.

Nothing is carried from step to step, so any restart, at any data-parallel width, goes on with exactly the samples that
come next. The order is a contract (``docs/design/contracts.md``): a checker derives it without this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64 from each state ``x`` (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
    Generators, OOPSLA 2014); arithmetic modulo 2⁶⁴, vectorised."""
    z = x + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=2)  # a step may straddle two passes
def permutation(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The order of all samples in pass ``epoch`` over the data, shape (samples,)."""
    key = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.array([epoch], np.uint64))
    order = np.argsort(splitmix64(key ^ np.arange(samples, dtype=np.uint64)), kind="stable")
    order.setflags(write=False)
    return order


@dataclass(frozen=True, slots=True)
class Sampler:
    """The sequence of samples of one job, as one data-parallel rank sees it."""

    seed: int
    samples: int  # training samples in one pass over the data
    samples_per_step: int  # over all ranks
    rank: int
    ranks: int

    def step(self, number: int) -> NDArray[np.int64]:
        """Ids of this rank's samples in step ``number`` (the first is 1), shape (samples_per_step // ranks,)."""
        share = self.samples_per_step // self.ranks
        first = (number - 1) * self.samples_per_step + self.rank * share
        index = np.arange(first, first + share)
        epochs = index // self.samples
        ids = np.empty(share, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = permutation(self.seed, int(epoch), self.samples)[index[here] % self.samples]
        return ids
