"""Reads the losses of a job's steps from its workers' step records, in every generation.

The records are copied at each look and nothing is held open: a pod cannot be taken away while somebody has a file of
its memory-backed volume open, and hangs in Terminating.
"""

from __future__ import annotations

import re
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from e2e.matrix.grounds import Grounds, Term
from lockstep_trainer.steprecord import StepReader, StepRecordError

_FIRST_RANK = re.compile(r"e(\d+)-g(\d+)-r0")
_POLL_SECONDS = 0.2
_NEWEST = 2
"""Generations that are looked at; the others have ended."""


class Losses:
    """Follows the workers of rank 0 in a thread; use as a context manager."""

    def __init__(self, grounds: Grounds, folder: Path) -> None:
        """``folder``: for the copies."""
        self._grounds, self._copy = grounds, folder / "steps"
        self._seen: dict[tuple[Term, int], float] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="losses", daemon=True)

    def __enter__(self) -> Losses:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def look(self) -> dict[tuple[Term, int], float]:
        """(generation, step) → loss, of all that was seen so far."""
        with self._lock:
            self._grounds.refresh()
            for term, folder in sorted(self._folders())[-_NEWEST:]:
                self._read(term, folder / "steps")
            return dict(self._seen)

    def _follow(self) -> None:
        while not self._end.wait(_POLL_SECONDS):
            self.look()

    def _folders(self) -> list[tuple[Term, Path]]:
        found = []
        for pod in list(self._grounds.place.pods.iterdir()):
            with suppress(OSError):  # its node has no power, or it went away
                for folder in list((pod / "workers").iterdir()):
                    if match := _FIRST_RANK.fullmatch(folder.name):
                        found.append(((int(match[1]), int(match[2])), folder))
        return found

    def _read(self, term: Term, steps: Path) -> None:
        with suppress(OSError, StepRecordError):
            shutil.copyfile(steps, self._copy)
            reader = StepReader(self._copy)
            try:
                for record in reader.new_records():
                    self._seen[term, record.step] = record.loss
            finally:
                reader.close()
