"""Which samples a step must consume: the published rule, written out one number at a time."""

from __future__ import annotations

from functools import lru_cache

_MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """One step of the SplitMix64 generator (Steele, Lea, Flood 2014) from state ``x``."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, num_samples: int) -> tuple[int, ...]:
    """The order of the samples in one pass over the data: sorted by a hash of their number."""
    key = splitmix64(splitmix64(seed) ^ epoch)
    return tuple(sorted(range(num_samples), key=lambda j: splitmix64(key ^ j)))


def sample_at(seed: int, num_samples: int, index: int) -> int:
    """The sample at a global index, 0 for the first that the run consumes."""
    epoch, place = divmod(index, num_samples)
    return permutation(seed, epoch, num_samples)[place]


def samples_of_step(seed: int, num_samples: int, per_step: int, step: int) -> list[int]:
    """The samples of step ``step`` (the first is 1), in order."""
    return [sample_at(seed, num_samples, index) for index in range((step - 1) * per_step, step * per_step)]
