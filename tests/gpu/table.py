"""``python -m gpu.table FILE …``: results in JSON, of ``python -m gpu`` and of benchmarks, a line for each group."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTH = 400


def lines(name: str, found: Any) -> Iterator[str]:
    """What holds only values is one line."""
    inner = {key: value for key, value in found.items() if isinstance(value, dict) and "median" not in value}
    own = {key: _short(value) for key, value in found.items() if key not in inner}
    if own:
        yield f"{name}: " + ", ".join(f"{key} {value}" for key, value in own.items())[:WIDTH]
    for key, value in inner.items():
        yield from lines(f"{name} / {key}", value)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']} ({value['p10']}–{value['p90']})"
    return " ".join(str(value).split())


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        if file.exists():
            found = json.loads(file.read_text())
            print("\n".join(lines(file.stem, found[-1] if isinstance(found, list) else found)), flush=True)
