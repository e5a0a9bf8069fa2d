"""The invariants of docs/design/membership.md and checkpoints.md, over half of ten thousand schedules: jobs that run on
and jobs that end among the faults. LOCKSTEP_SIMULATION_SEEDS says how many seeds, two schedules each."""

from __future__ import annotations

import pytest

from simulation.batch import tried
from simulation.schedules import BATCHES, SEEDS, seeds_of


@pytest.mark.parametrize("batch", range(BATCHES))
def test_protocol_holds(batch: int) -> None:
    seeds = seeds_of(0, batch)
    count = tried(seeds)
    print(count)
    assert count.schedules == 2 * len(seeds)
    assert count.generations > count.schedules, "the faults did not reach the protocol"
    assert SEEDS < 100 or count.faults > 5 * count.schedules, "too few faults"
