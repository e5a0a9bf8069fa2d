"""Results of the whole matrix, kept while it is run: a later run of the same source begins where it stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from parity.cases import Case
from parity.run import Result

_REPOSITORY = Path(__file__).parents[2]
_TRAINER = "trainer/lockstep_trainer"
_SOURCE = (
    *(
        f"{_TRAINER}/{name}"
        for name in ("parallel", "model", "optim", "batch.py", "loss.py", "precision.py", "modules.py")
    ),
    *("tests/parity", "tests/composed.py", "tests/forked.py"),
)
"""What a cell's numbers depend on: neither checkpoints nor agents are among it."""


class Journal:
    """Cells that have passed, a JSON line each. Without a file nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._passed: dict[str, dict[str, object]] = {}
        if path is not None and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            found = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half a line
            self._passed = {line["name"]: line for line in found}

    @classmethod
    def open(cls) -> Journal:
        """The journal of this source: of what the cells run."""
        digest = hashlib.sha256()
        for place in _SOURCE:
            path = _REPOSITORY / place
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                digest.update(file.read_bytes())
        path = _REPOSITORY / "build/parity" / f"{digest.hexdigest()[:16]}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path)

    def __contains__(self, case: Case) -> bool:
        return case.name in self._passed

    def get(self, case: Case) -> Result | None:
        """The result of a cell that has passed before."""
        line = self._passed.get(case.name)
        return line and Result(case, line["seconds"], line["cpu_seconds"], line["errors"], "")  # type: ignore

    def add(self, result: Result) -> Result:
        """Keep a result, where the cell passed."""
        if self._path is not None and not result.failure:
            line = {"name": result.case.name, **asdict(result)}
            del line["case"]
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return result
