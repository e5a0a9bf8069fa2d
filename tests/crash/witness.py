"""Watches the workers of a run from its side: every loss of every generation, and what each was restored from.

The journal has the same, but a leader that loses its power takes the newest lines with it; a worker's files stay
readable as long as they are held open.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from lockstep_trainer.steprecord import StepReader, StepRecordError

Term = tuple[int, int]

_FOLDER = re.compile(r"e(\d+)-g(\d+)-r0")
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Restored:
    """What a generation began from."""

    term: Term
    step: int
    source: str  # "store", or "memory"
    folder: str  # in the store; empty where there was none
    ordered: str  # the folder that its orders named


@dataclass(slots=True)
class _Watched:
    """Rank 0 of one generation."""

    term: Term
    folder: Path
    ordered: str = ""
    steps: StepReader | None = None
    events: BinaryIO | None = None
    rest: bytes = b""  # of a line that is not whole yet


@dataclass(frozen=True, slots=True)
class Testimony:
    """What was seen so far."""

    losses: dict[tuple[Term, int], float] = field(default_factory=dict)  # (term, step) → loss
    restored: list[Restored] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # what workers said about checkpoints
    lost: int = 0  # step records that were overwritten before they were read


class Witness:
    """Follows the workers of rank 0 in a thread; use as a context manager."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._watched: dict[Path, _Watched] = {}
        self._testimony = Testimony()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="witness", daemon=True)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def look(self) -> Testimony:
        """All that can be known now."""
        with self._lock:
            for each in self._folders():
                self._read(each)
            lost = sum(each.steps.lost for each in self._watched.values() if each.steps is not None)
            return replace(self._testimony, lost=lost)

    def newest(self) -> int:
        """The highest step that was ever done."""
        losses = self.look().losses
        with self._lock:
            return max((step for _, step in losses), default=0)

    def _follow(self) -> None:
        while not self._end.wait(_POLL_SECONDS):
            self.look()

    def _folders(self) -> Iterator[_Watched]:
        for folder in self._state.glob("pods/*/workers/*"):
            if folder not in self._watched and (match := _FOLDER.fullmatch(folder.name)):
                self._watched[folder] = _Watched((int(match[1]), int(match[2])), folder)
        yield from list(self._watched.values())

    def _read(self, watched: _Watched) -> None:
        if watched.steps is None:
            with suppress(FileNotFoundError, StepRecordError):
                watched.steps = StepReader(watched.folder / "steps")
        if watched.steps is not None:
            for record in watched.steps.new_records():
                self._testimony.losses[watched.term, record.step] = record.loss
        if not watched.ordered:
            with suppress(FileNotFoundError, ValueError):
                watched.ordered = _folder(json.loads((watched.folder / "start.json").read_bytes()).get("restore"))
        if watched.events is None:
            with suppress(FileNotFoundError):
                watched.events = (watched.folder / "events.jsonl").open("rb")
        if watched.events is not None:
            *lines, watched.rest = (watched.rest + watched.events.read()).split(b"\n")
            for line in lines:
                self._heard(watched, json.loads(line))

    def _heard(self, watched: _Watched, line: dict[str, Any]) -> None:
        if line["kind"] == "restore":
            folder = _folder(line) if line.get("manifest") else ""
            source = line.get("source", "store")
            self._testimony.restored.append(Restored(watched.term, line["step"], source, folder, watched.ordered))
        elif line["kind"] == "checkpoint_problem":
            self._testimony.problems.append(line["message"])


def _folder(point: dict[str, Any] | None) -> str:
    return str(point["manifest"]).rpartition("/")[0] if point else ""
