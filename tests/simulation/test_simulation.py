"""The membership protocol keeps its promises under seeded faults, and the simulation notices when a rule is changed.

Each seed is two schedules. LOCKSTEP_SIMULATION_SEEDS=5000 pytest tests/simulation -k holds   tries ten thousand;
``python -m simulation --runs 1000000 --jobs 0`` a million.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.mutations import MUTATIONS, Mutation
from simulation.run import run

BATCHES = 8
SEEDS = int(os.environ.get("LOCKSTEP_SIMULATION_SEEDS", "160"))
RARE = {"believe-an-old-answer", "trust-a-lost-answer", "start-while-committing"}  # need a few hundred seeds


@pytest.mark.parametrize("batch", range(BATCHES))
def test_protocol_holds(batch: int) -> None:
    """Invariants (a)-(f) of PROTOCOLS §3 over jobs that run on and jobs that end among the faults."""
    generations = 0
    for seed in range(batch, SEEDS, BATCHES):
        generations += run(seed).generations + run(seed, short=True).generations
    assert generations > SEEDS // BATCHES, "the faults did not reach the protocol"


def test_a_seed_repeats_itself() -> None:
    """A violation can be looked at again: the same seed gives the same world."""
    assert run(3) == run(3)


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(m, id=m.name, marks=[pytest.mark.slow] if m.name in RARE else []) for m in MUTATIONS],
)
def test_changed_rule_is_noticed(mutation: Mutation) -> None:
    """Each one-line change of the rules makes some seed fail: the simulation would have found that bug."""
    done = subprocess.run(
        [sys.executable, "-m", "simulation.mutations", mutation.name],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
