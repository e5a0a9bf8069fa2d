"""Instants at which something is killed: a worker's section, or a file that has just appeared.

The tables name all that a checkpoint may leave on its way. A campaign draws among what its job's first checkpoints have
shown; at least one instant of each phase must be among that: see `require`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from localrun import victims

SECTIONS = ("load", "forward", "backward", "collective", "optimizer", "checkpoint", "stage")
"""Of a worker's step; ``restore`` is for a worker that has just been started again."""

PHASES = ("stage", "upload", "commit")

Mark = tuple[str, int, int]
"""A file: its path, inode and modification time, so that a replaced file is another one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where files of a run appear."""

    pods: Path  # run folders of the pods, local
    run: Path  # the run's objects, as the server keeps them
    bucket: Path


@dataclass(frozen=True, slots=True)
class Appears:
    """A file whose path matches appears, or is replaced."""

    name: str
    phase: str
    look: Callable[[Place], Iterable[str]]  # folders to look into, as they are now
    pattern: re.Pattern[str]

    def marks(self, place: Place) -> frozenset[Mark]:
        """Files that match, now."""
        return frozenset(mark for folder in self.look(place) for mark in _marks(folder, self.pattern))


def _marks(folder: str, pattern: re.Pattern[str]) -> Iterable[Mark]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if pattern.fullmatch(entry.name):
            try:
                stat = entry.stat()
            except OSError:
                continue
            yield entry.path, stat.st_ino, stat.st_mtime_ns


def _step_folders(place: Place) -> Iterable[str]:
    """The newest folders only: those of a long run would take too long to look through."""
    try:
        found = [entry.path for entry in os.scandir(place.run) if entry.name.startswith("step-")]
    except OSError:
        return []
    return sorted(found, key=lambda path: int(path.rpartition("/step-")[2].split("-")[0]))[-4:]


def _workers(place: Place) -> Iterable[str]:
    return (str(victim.folder) for victim in victims.workers(place.pods.parent))


def _snapshots(place: Place) -> Iterable[str]:
    return (str(path) for path in place.pods.glob("*/snapshots"))


def _ranks(place: Place) -> Iterable[str]:
    return (str(path) for path in place.pods.glob("*/snapshots/r*"))


def _buddies(place: Place) -> Iterable[str]:
    return (str(path) for path in place.pods.glob("*/snapshots/buddies/r*"))


def _multiparts(place: Place) -> Iterable[str]:
    return (str(path) for path in (place.bucket / ".sgwtmp/multipart").glob("*/*"))


def _run(place: Place) -> Iterable[str]:
    return (str(place.run),)


APPEARS = (
    Appears("staged", "stage", _ranks, re.compile(r"buffer-\d+\.json")),
    Appears("copied to the buddy", "stage", _buddies, re.compile(r"buffer-\d+\.json")),
    Appears("kept", "stage", _snapshots, re.compile(r"kept\.json")),
    Appears("pinned", "upload", _snapshots, re.compile(r"pinned\.json")),
    Appears("step folder", "upload", _run, re.compile(r"step-.*")),
    Appears("data file", "upload", _step_folders, re.compile(r"__.*\.distcp")),
    Appears("part of a data file", "upload", _multiparts, re.compile(r"\d+")),
    Appears("ranges", "upload", _step_folders, re.compile(r"ranges-.*\.json")),
    Appears("samples", "upload", _step_folders, re.compile(r"samples-.*\.jsonl")),
    Appears(".metadata", "upload", _step_folders, re.compile(r"\.metadata")),
    Appears("all files saved", "commit", _workers, re.compile(r"saved\.json")),
    Appears("manifest", "commit", _step_folders, re.compile(r"manifest\.json")),
    Appears("latest", "commit", _run, re.compile(r"latest")),
    Appears("told to be durable", "commit", _snapshots, re.compile(r"durable\.json")),
)
"""All that can be aimed at."""


def seen(place: Place) -> tuple[Appears, ...]:
    """The instants of which there is a file by now."""
    return tuple(each for each in APPEARS if each.marks(place))


def require(instants: Iterable[Appears], sections: Iterable[str]) -> None:
    """Raises AssertionError where a phase can't be aimed at: a file or section of the tables has got another name."""
    phases = {each.phase for each in instants} | ({"stage"} if {"stage", "checkpoint"} & set(sections) else set())
    missing = [phase for phase in PHASES if phase not in phases]
    assert not missing, f"no file or section of {missing} was seen: bring tests/crash/instants.py up to date"


def wait_for(instant: Appears, place: Place, seconds: float, over: Callable[[], bool]) -> str | None:
    """The name of the file that appeared; None where none came in time, or the run is over."""
    known = instant.marks(place)
    deadline = time.monotonic() + seconds
    looks = 0
    while time.monotonic() < deadline:
        if fresh := instant.marks(place) - known:
            return Path(min(fresh)[0]).name
        looks += 1
        if looks % 500 == 0 and over():
            return None
        time.sleep(0.0005)
    return None
