"""Output of the pods of a local run: each supervisor's stdout is a file, with rank and step in front of each line."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep_cli import target
from lockstep_cli.errors import NotFoundError
from lockstep_cli.output import Output

_PREFIX = re.compile(r"^\[(?:step (?P<step>\d+) )?rank (?P<rank>\d+)\] (?P<text>.*)$")
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines are asked for."""

    rank: int | None = None
    tail: int | None = None
    follow: bool = False

    def select(self, lines: Iterable[str]) -> list[str]:
        """The lines of the rank, the last ones if so asked."""
        kept = [line for line in lines if self.matches(line)]
        return kept[-self.tail :] if self.tail is not None else kept

    def matches(self, line: str) -> bool:
        """Whether the line is from the wanted rank; lines of the agent have none."""
        if self.rank is None:
            return True
        found = _PREFIX.match(line)
        return found is not None and int(found["rank"]) == self.rank


def emit(pod: str, line: str, output: Output) -> None:
    """One line to standard output."""
    if output.as_json:
        found = _PREFIX.match(line)
        fields = {"pod": pod, "rank": int(found["rank"]), "step": found["step"] and int(found["step"])} if found else {}
        line = json.dumps({"pod": pod, **fields, "text": found["text"] if found else line})
    sys.stdout.write(line + "\n")


def show(folder: Path, wanted: Wanted, output: Output) -> None:
    """Prints the logs of a local run; raises NotFoundError when there are none."""
    pods = sorted(folder.glob("pods/*.log"))
    if not pods:
        raise NotFoundError(f"{folder}: no logs in it; has the run started a pod?")
    places: dict[Path, int] = {}
    shown = 0
    for file in pods:
        text = file.read_text(errors="replace")
        complete = text[: text.rfind("\n") + 1]
        places[file] = len(complete.encode())
        for line in wanted.select(complete.splitlines()):
            emit(file.stem, line, output)
            shown += 1
    if not shown and wanted.rank is not None and not wanted.follow:
        raise NotFoundError(
            f"{folder}: rank {wanted.rank} has said nothing; ranks run from 0 to nodes × gpusPerNode - 1"
        )
    sys.stdout.flush()
    while wanted.follow and not _ended(folder):
        time.sleep(_POLL_SECONDS)  # files have no way to be waited for
        for file, place in places.items():
            for line in _appended(file, place, places):
                if wanted.matches(line):
                    emit(file.stem, line, output)
        sys.stdout.flush()


def _appended(file: Path, place: int, places: dict[Path, int]) -> Iterator[str]:
    with file.open("rb") as stream:
        stream.seek(place)
        content = stream.read()
    complete = content[: content.rfind(b"\n") + 1]
    places[file] = place + len(complete)
    yield from complete.decode(errors="replace").splitlines()


def _ended(folder: Path) -> bool:
    phase = target.load_local(folder).status.phase
    return phase is not None and phase.terminal
