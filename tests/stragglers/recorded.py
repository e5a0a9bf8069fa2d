"""Recorded jobs: the own work of each rank as it was measured, so that faults are put into a real machine's noise.

The file: lines of JSON, compressed with gzip. The first says what was recorded, when, on what, and by which command.
Each other line is one rank's step: ``step``, ``rank``, and the values of ``work.Work`` by name, in seconds.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep_trainer.stragglers.work import Work
from stragglers.scenarios.layout import Layout
from stragglers.scenarios.physics import Floats

FOLDER = Path(__file__).parent / "traces"


@dataclass(frozen=True)
class Trace:
    """What the ranks computed. What their hosts and loaders were late with is in the file, but isn't taken: it is
    mostly what other processes of the machine took, and a pod has its CPUs for itself."""

    compute: Floats
    """Seconds, (steps, ranks)."""

    def window(self, first: int, steps: int) -> Trace:
        """Some of its steps."""
        return Trace(self.compute[first : first + steps])

    def by_rank(self, steps: NDArray[np.int64], layout: Layout) -> Floats:
        """Those steps of the ranks at the coordinates of ``layout``, (steps, data, pipeline, tensor); a copy."""
        if layout.size != self.compute.shape[1]:
            raise ValueError(f"the trace has {self.compute.shape[1]} ranks, not the {layout.size} of {layout.name}")
        return self.compute[steps][:, layout.ranks]


def write(path: Path, head: Mapping[str, Any], steps: Iterable[tuple[int, list[Work]]]) -> None:
    """Keep a recording; ``steps`` are (number, the work of all ranks)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(head) + "\n")
        for number, works in steps:
            file.writelines(json.dumps({"step": number, **_rounded(work)}) + "\n" for work in works)


@cache
def read(path: Path) -> Trace:
    """A recording. A step that is not there for all ranks is an error that names it."""
    with gzip.open(path, "rt") as file:
        next(file)
        lines = [json.loads(line) for line in file]
    ranks = 1 + max(line["rank"] for line in lines)
    found: dict[int, dict[int, Any]] = {}
    for line in lines:
        found.setdefault(line["step"], {})[line["rank"]] = line
    for step, by_rank in found.items():
        if len(by_rank) != ranks:
            raise ValueError(f"{path}: step {step} has {len(by_rank)} of {ranks} ranks")

    steps = [[found[step][rank]["compute"] for rank in range(ranks)] for step in sorted(found)]
    return Trace(np.array(steps))


def _rounded(work: Work) -> dict[str, Any]:
    """Microseconds are enough."""
    values = asdict(work)
    for name in ("compute", "data", "host"):
        values[name] = round(values[name], 6)
    values["waited"] = {name: round(seconds, 6) for name, seconds in work.waited.items()}
    return values
