"""``python -m simulation``: run many schedules; exits 1 at the first violation.

A schedule is a seed and a length: jobs that run on, and jobs that end among the faults.
``python -m simulation --runs 1000000 --jobs 0`` tries a million of them, on all cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing import Pool

from simulation.invariants import Violation
from simulation.run import Outcome, run

_CHUNK = 8


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="simulation", description="Run many schedules of faults.")
    parser.add_argument("--seeds", type=int, default=200, help="how many, two schedules each; default 200")
    parser.add_argument("--runs", type=int, help="how many schedules, instead of --seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed, default 0")
    parser.add_argument("--jobs", type=int, default=1, help="processes, default 1; 0: one per core")
    arguments = parser.parse_args()
    seeds = arguments.seeds if arguments.runs is None else -(-arguments.runs // 2)
    begun, steps, faults, epochs, generations = time.perf_counter(), 0, 0, 0, 0
    for outcomes in _all(range(arguments.first, arguments.first + seeds), arguments.jobs or os.cpu_count() or 1):
        if isinstance(outcomes, str):
            sys.exit(f"violation: {outcomes}")
        for outcome in outcomes:
            steps, faults = steps + outcome.steps, faults + outcome.faults
            epochs, generations = epochs + outcome.epoch, generations + outcome.generations
    print(
        f"{2 * seeds} schedules: {faults} faults, {epochs} epochs, {generations} generations, {steps} steps; "
        f"{time.perf_counter() - begun:.1f} s"
    )


def _all(seeds: range, jobs: int) -> Iterator[list[Outcome] | str]:
    if jobs == 1:
        yield from map(_both, seeds)
        return
    with Pool(jobs) as pool:
        yield from pool.imap_unordered(_both, seeds, chunksize=_CHUNK)


def _both(seed: int) -> list[Outcome] | str:
    """A seed's two schedules, or the violation in words: it does not travel between processes as an exception."""
    try:
        return [run(seed), run(seed, short=True)]
    except Violation as violation:
        return str(violation)


if __name__ == "__main__":
    main()
