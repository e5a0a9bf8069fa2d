"""What a campaign did: a line per round, and the sums."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from crash.strikes import Kill
from crash.witness import Restored

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Round:
    """Strikes, and the recovery from them."""

    number: int
    job: int
    kills: tuple[Kill, ...]
    damaged: tuple[str, ...]  # what was done to which file
    step: int  # that the job was at
    restored: tuple[Restored, ...]  # by each generation that got so far
    fallbacks: int  # restores that met a damaged checkpoint and took an older one
    problems: tuple[str, ...]  # what workers said about checkpoints
    restarts: int
    aiming: float  # seconds until all was struck
    seconds: float  # from there to a new durable checkpoint


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a campaign, at its end."""

    number: int
    steps: int
    checked: str  # the checker's sentence
    losses: int  # compared with the undisturbed run's, redone steps and lost ones too
    generations: int
    seconds: float


class Journal:
    """A file of JSON lines, written as things happen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, entry: Round | Job) -> None:
        """Append one line."""
        line = {"kind": type(entry).__name__.lower(), "at": datetime.now(UTC).isoformat(), **asdict(entry)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def summary(rounds: Sequence[Round], jobs: Sequence[Job], seed: int) -> dict[str, Any]:
    """The result as JSON."""
    kills = [kill for each in rounds for kill in each.kills]
    restored = [one for each in rounds for one in each.restored]
    seconds = sorted(each.seconds for each in rounds)
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return {
        "what": "kills at instants drawn from a seed, damaged objects, and what each recovery went on from",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or "unknown",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load": round(os.getloadavg()[0], 2),
        "seed": seed,
        "rounds": len(rounds),
        "jobs": len(jobs),
        "kills": len(kills),
        "by_part": dict(Counter(kill.part for kill in kills).most_common()),
        "by_instant": dict(Counter(kill.aim for kill in kills).most_common()),
        "at_the_instant": sum(kill.hit for kill in kills),
        "damaged_checkpoints": sum(len(each.damaged) for each in rounds),
        "recoveries": len(restored),
        "from": dict(Counter(one.source for one in restored)),
        "fallbacks": sum(each.fallbacks for each in rounds),
        "damaged_checkpoints_accepted": 0,  # else there would be no result
        "restarts": sum(each.restarts for each in rounds),
        "losses_compared": sum(job.losses for job in jobs),
        "seconds_to_durable": {
            "median": seconds[len(seconds) // 2], "p90": seconds[len(seconds) * 9 // 10], "max": seconds[-1]
        },
        "seconds": round(sum(job.seconds for job in jobs), 1),
        "checked": [job.checked for job in jobs],
    }  # fmt: skip


def table(result: dict[str, Any]) -> Table:
    """The sums, for a screen."""
    shown = Table("", "", title=f"{result['rounds']} rounds on {result['jobs']} jobs, seed {result['seed']}")
    for name in ("kills", "by_part", "by_instant", "at_the_instant", "damaged_checkpoints", "recoveries", "from",
                 "fallbacks", "damaged_checkpoints_accepted", "restarts", "losses_compared", "seconds_to_durable",
                 "seconds"):  # fmt: skip
        value = result[name]
        text = "\n".join(f"{key}: {number}" for key, number in value.items()) if isinstance(value, dict) else str(value)
        shown.add_row(name.replace("_", " "), text)
    return shown
