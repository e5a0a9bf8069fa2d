"""``python -m simulation``: run many schedules; exits 1 at the first violation, with the command that replays it.

A schedule is a seed and a length: jobs that run on, and jobs that end among the faults. A million of them, in pieces
that may be broken off at any time: ``python -m simulation --runs 1000000 --jobs 0 --state million.json``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from simulation.batch import State, resumed
from simulation.run import run

SAY_SECONDS = 10.0


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="simulation", description="Run many schedules of faults.")
    parser.add_argument("--seeds", type=int, default=200, help="how many, two schedules each; default 200")
    parser.add_argument("--runs", type=int, help="how many schedules, instead of --seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed, default 0")
    parser.add_argument("--jobs", type=int, default=1, help="processes, default 1; 0: one per core")
    parser.add_argument("--state", type=Path, help="file to go on from, and to keep what has held in")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one schedule and show where it fails")
    parser.add_argument("--short", action="store_true", help="with --replay: the job that ends among the faults")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        print(run(arguments.replay, short=arguments.short))
        return
    seeds = arguments.seeds if arguments.runs is None else -(-arguments.runs // 2)
    try:
        state = (State.load(arguments.state) if arguments.state else None) or State(arguments.first, arguments.first)
    except ValueError as error:
        sys.exit(str(error))
    if state.first != arguments.first:
        sys.exit(f"{arguments.state} begins with seed {state.first}: say --first {state.first}, or name another file")
    progress = Progress(arguments.state, seeds)
    try:
        seeds_left = range(state.next, state.first + seeds)
        state = resumed(state, seeds_left, arguments.jobs or os.cpu_count() or 1, progress)
    except AssertionError as failure:
        progress.keep()
        sys.exit(f"violation: {failure}")
    except KeyboardInterrupt:
        progress.keep()
        sys.exit(130)
    progress.keep()
    print(state.count)


class Progress:
    """Says and keeps how far it is, every few seconds."""

    def __init__(self, path: Path | None, seeds: int) -> None:
        self._path, self._seeds = path, seeds
        self._newest: State | None = None
        self._said_at = time.monotonic()

    def __call__(self, state: State) -> None:
        self._newest = state
        if time.monotonic() - self._said_at >= SAY_SECONDS:
            self._said_at = time.monotonic()
            self.keep()
            print(f"{state.next - state.first} of {self._seeds} seeds, {state.count}", flush=True)

    def keep(self) -> None:
        """Write it down."""
        if self._path and self._newest:
            self._newest.save(self._path)


if __name__ == "__main__":
    main()
