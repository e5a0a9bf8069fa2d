"""A snapshot that is asked for: an agent writes the file ``request`` beside the snapshots, workers look once a step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lockstep_trainer.supervisor import read_json, write_json

NAME = "request"


@dataclass(frozen=True, slots=True)
class Request:
    """Take a snapshot as soon as may be."""

    hold: bool
    """And make no step behind it: the generation is to end there."""


def ask(snapshots: Path, *, hold: bool) -> None:
    """``snapshots``: the folder of that name in the run folder."""
    snapshots.mkdir(parents=True, exist_ok=True)
    write_json(snapshots / NAME, {"hold": hold})


class Requests:
    """A worker's look at them. What was asked before it began is not meant for it."""

    def __init__(self, snapshots: Path) -> None:
        self._path, self._seen = snapshots / NAME, time.time_ns()

    def look(self) -> Request | None:
        """What was asked since the last look."""
        try:
            touched = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if touched <= self._seen:
            return None
        self._seen = touched
        return Request(hold=bool((read_json(self._path) or {}).get("hold")))
