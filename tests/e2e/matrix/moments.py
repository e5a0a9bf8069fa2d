"""When a fault strikes: in a phase of a worker's step, of a checkpoint, or of a recovery."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from crash.instants import APPEARS, Appears, wait_for
from e2e.matrix.grounds import Grounds, NothingThereError, Term, Worker
from localrun import victims
from lockstep_trainer.steprecord import STARTING, StepReader, StepRecordError

PATIENCE = 20.0
"""Seconds that a fault waits for its instant; then it strikes at once."""
MOST_LATE = 0.6
"""Seconds after the last fault's end within which a fault at any time strikes."""


@dataclass(frozen=True, slots=True)
class Phase:
    """An instant is a section that a worker is in, or a file that appears; without either it is drawn."""

    name: str
    sections: frozenset[str] = frozenset()
    files: tuple[Appears, ...] = ()
    recovers: bool = False
    """A worker is killed first, and the instant is one of the generation after it."""


def _of(*phases: str) -> tuple[Appears, ...]:
    # Files in the folders of workers are found by numbers of processes, which are others in a pod.
    return tuple(each for each in APPEARS if each.phase in phases and each.name != "all files saved")


PHASES = {
    each.name: each
    for each in (
        Phase("forward", frozenset({"forward", "pipeline"})),  # a pipeline has no forward of its own
        Phase("collective", frozenset({"collective"})),
        Phase("optimizer", frozenset({"optimizer"})),
        Phase("staging", files=_of("stage")),
        Phase("commit", files=_of("upload", "commit")),
        Phase("recovery", frozenset({STARTING, "rendezvous", "build", "restore"}), recovers=True),
        Phase("any", frozenset()),
    )
}


@dataclass
class Moment:
    """The instant: what it was, and the worker that is held in it."""

    what: str
    hit: bool = True
    """Whether it is the one that was aimed at."""
    worker: Worker | None = None
    """The worker that was looked at. It stands still until it is let go, so that the fault lands where it should."""
    _held: bool = field(default=False)

    def hold(self, worker: Worker) -> None:
        """It is stopped."""
        self.worker, self._held = worker, True

    def let_go(self) -> None:
        """Lets the worker go on."""
        if self._held and self.worker is not None:
            self._held = False
            with suppress(ProcessLookupError):
                os.kill(self.worker.pid, signal.SIGCONT)

    def keep(self) -> None:
        """Leaves it as it is: killed, or stopped for good."""
        self._held = False


@contextmanager
def moment(phase: Phase, grounds: Grounds, dice: random.Random, say: Callable[[str], None]) -> Iterator[Moment]:
    """Waits for an instant of the phase. Raises NothingThereError where no worker is alive."""
    now = _wait(phase, grounds, dice, say)
    try:
        yield now
    finally:
        now.let_go()


def _wait(phase: Phase, grounds: Grounds, dice: random.Random, say: Callable[[str], None]) -> Moment:
    workers = grounds.workers()
    if not workers:
        raise NothingThereError("no worker is alive")
    victim = dice.choice(workers)
    if phase.files:
        seen = [each for each in phase.files if each.marks(grounds.place)]
        file = dice.choice(seen or phase.files)  # small files have no parts
        found = wait_for(file, grounds.place, PATIENCE, lambda: False)
        return Moment(f"{file.name}: {found}", found is not None)
    after: Term = (0, 0)
    if phase.recovers:
        say(f"rank {victim.rank} is killed first")
        os.kill(victim.pid, signal.SIGKILL)
        after = max(worker.term for worker in workers)
    if phase.sections:
        held = _held_in(phase.sections, grounds, victim.rank, after)
        if held is None:
            return Moment(f"{phase.name} was not seen", hit=False)
        return held
    delay = dice.uniform(0.0, MOST_LATE)
    time.sleep(delay)  # a drawn instant, and no wait for anything
    return Moment(f"{delay:.3f} s later")


def _held_in(sections: frozenset[str], grounds: Grounds, rank: int, after: Term) -> Moment | None:
    """The worker of a rank, of a later term, stopped in one of the sections."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        worker = next((w for w in grounds.workers() if w.rank == rank and w.term > after), None)
        found = worker and _watch(worker, sections, deadline)
        if found:
            return found
        time.sleep(0.002)
    return None


def _watch(worker: Worker, sections: frozenset[str], deadline: float) -> Moment | None:
    """Looks at one worker until it is caught, or gone."""
    try:
        reader = StepReader(worker.folder / "steps")
    except (OSError, StepRecordError):
        return None
    try:
        looks = 0
        while time.monotonic() < deadline:
            looks += 1
            if reader.section in sections:
                os.kill(worker.pid, signal.SIGSTOP)
                now = Moment("")
                now.hold(worker)
                victims.wait_stopped(worker.pid)
                section = reader.section
                if section in sections:
                    now.what = f"rank {worker.rank} in {section}, term {worker.term}"
                    return now
                now.let_go()
            elif looks % 5000 == 0 and ((worker.folder / "exit.json").exists() or _rests(worker)):
                return None
    except ProcessLookupError:
        return None
    finally:
        reader.close()
    return None


def _rests(worker: Worker) -> bool:
    """Whether the worker has been told to rest: its sections are those of another folder from then on."""
    return (worker.folder / "idle.json").exists()
