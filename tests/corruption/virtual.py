"""How long a fault stays unfound, over steps that nobody computes: the sampling and the faults' draws are those of the
trainer, and every strike in what is compared counts as seen."""

from __future__ import annotations

from itertools import count

from lockstep_trainer.injection.bitflips import Fault
from lockstep_trainer.replay.sampling import Sampling

SHARES = (0.0025, 0.01, 0.1, 1.0)
"""Shares of the steps that are replayed; the first is the default."""


def steps_until_found(seed: int, share: float, rate: float, *, micro_batches: int = 2) -> int:
    """Steps from a fault's first day to its find, this one included. On a replayed step the rank draws for the
    micro-batch that it replays, then, as on every other, for each of its own."""
    sampling, stream = Sampling(seed, share), Fault(0, "product", rate=rate, seed=seed).stream()
    for step in count(1):
        sampled = sampling.includes(step)
        seen = sampled and stream.random() < rate
        own = [stream.random() < rate for _ in range(micro_batches)]
        if seen or (sampled and own[0]):
            return step
    raise AssertionError
