"""Many schedules, some of them at once: what the tests and the command line share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from multiprocessing import Pool
from pathlib import Path

from simulation.run import Outcome, run

_CHUNK = 8


@dataclass(frozen=True)
class Count:
    """What was tried, in sums over schedules."""

    schedules: int = 0
    faults: int = 0
    epochs: int = 0
    generations: int = 0
    steps: int = 0
    seconds: float = 0.0
    """CPU time."""

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Count)))

    @classmethod
    def of(cls, outcome: Outcome, seconds: float) -> Count:
        """One schedule."""
        return cls(1, outcome.faults, outcome.epoch, outcome.generations, outcome.steps, seconds)

    def __str__(self) -> str:
        return (
            f"{self.schedules} schedules: {self.faults} faults, {self.epochs} epochs, {self.generations} generations, "
            f"{self.steps} steps; {self.seconds:.0f} CPU seconds"
        )


@dataclass(frozen=True)
class Failure:
    """A schedule that broke a rule, or a core. Words, since not every exception travels between processes."""

    seed: int
    short: bool
    problem: str

    @property
    def replay(self) -> str:
        """The command that runs it again."""
        short = " --short" if self.short else ""
        return f"PYTHONPATH=tests .venv/bin/python -m simulation --replay {self.seed}{short}"


def both(seed: int) -> tuple[int, Count | Failure]:
    """A seed's two schedules: a job that runs on, and one that ends among the faults."""
    count = Count()
    for short in (False, True):
        begun = time.process_time()
        try:
            count += Count.of(run(seed, short=short), time.process_time() - begun)
        except Exception as problem:  # whatever it is, others must hear of it
            return seed, Failure(seed, short, str(problem) or repr(problem))
    return seed, count


def tried(seeds: Iterable[int]) -> Count:
    """Raises AssertionError at the first failure, with the command that replays it."""
    total = Count()
    for seed in seeds:
        _, found = both(seed)
        if isinstance(found, Failure):
            raise AssertionError(f"{found.problem}\n{found.replay}")
        total += found
    return total


def in_order(seeds: range, jobs: int) -> Iterator[tuple[int, Count | Failure]]:
    """All of them, on so many processes, in the order of the seeds: so that what is done is one number."""
    if jobs == 1:
        yield from map(both, seeds)
        return
    with Pool(jobs) as pool:
        yield from pool.imap(both, seeds, chunksize=_CHUNK)


@dataclass(frozen=True)
class State:
    """How far a long run is: seeds from ``first`` to ``next``, the latter not included, have held."""

    first: int
    next: int
    count: Count = Count()

    @classmethod
    def load(cls, path: Path) -> State | None:
        """What a run before has left; None: nothing. Raises ValueError where the file is something else."""
        try:
            raw = json.loads(path.read_text())
            return cls(raw["first"], raw["next"], Count(**raw["count"]))
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no state of a run: {error!r}; name another file, or remove it") from None

    def save(self, path: Path) -> None:
        """As a whole or not at all."""
        fresh = path.with_name(f".{path.name}")
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n")
        fresh.replace(path)


def resumed(state: State, seeds: range, jobs: int, told: Callable[[State], None]) -> State:
    """Go on from ``state`` with ``seeds``; ``told`` hears how far it is after each. Raises AssertionError at the first
    failure: all before it have held and were told."""
    for seed, found in in_order(seeds, jobs):
        if isinstance(found, Failure):
            raise AssertionError(f"{found.problem}\n{found.replay}")
        state = State(state.first, seed + 1, state.count + found)
        told(state)
    return state
