"""How the benchmarks keep what they measure: JSON in docs/results, each result with its origin."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs/results"


def origin(what: str, versions: str) -> dict[str, Any]:
    """The first lines of a result: what it is, when it was measured, at which commit, on what; ``versions`` names the
    software that matters."""
    return {
        "what": what,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {versions}",
    }


def _commit() -> str:
    """Empty in a copy of the files that has no history."""
    try:
        return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def add(result: Mapping[str, Any], path: Path) -> None:
    """Print a result and put it behind those that the file has."""
    print(json.dumps(result, indent=1))
    before = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*before, result], indent=1) + "\n")
