"""``python -m simulation``: run many seeds; exits 1 at the first violation."""

from __future__ import annotations

import argparse
import sys
import time

from simulation.invariants import Violation
from simulation.run import run


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many, default 200")
    parser.add_argument("--first", type=int, default=0, help="the first one, default 0")
    arguments = parser.parse_args()
    begun, steps, faults, epochs, generations = time.perf_counter(), 0, 0, 0, 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        for short in (False, True):
            try:
                outcome = run(seed, short=short)
            except Violation as violation:
                sys.exit(f"violation: {violation}")
            steps, faults = steps + outcome.steps, faults + outcome.faults
            epochs, generations = epochs + outcome.epoch, generations + outcome.generations
    print(
        f"{arguments.seeds} seeds: {faults} faults, {epochs} epochs, {generations} generations, {steps} steps; "
        f"{time.perf_counter() - begun:.1f} s"
    )


if __name__ == "__main__":
    main()
