"""How many schedules the tests try, and which of the two files tries which: they run beside each other."""

from __future__ import annotations

import os

FILES = 2
BATCHES = 10
"""Of each file."""
SEEDS = int(os.environ.get("LOCKSTEP_SIMULATION_SEEDS", "5000"))
"""Two schedules each: ten thousand."""


def seeds_of(file: int, batch: int) -> range:
    """Every so many-th seed; all batches of all files together are all seeds."""
    return range(file * BATCHES + batch, SEEDS, FILES * BATCHES)
