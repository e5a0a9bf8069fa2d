"""The benchmark's file: a JSON line for everything that was done, so that it goes on where it was stopped."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

What = Literal["trial", "clean", "cost", "virtual"]


class Kept:
    """What has been done, by what it is and its name."""

    def __init__(self, path: Path) -> None:
        """A last line that was not written to its end is left out, and gone with the next."""
        self._path = path
        self._done: dict[What, dict[str, dict[str, Any]]] = defaultdict(dict)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        for line in whole.splitlines():
            read = json.loads(line)
            self._done[read["what"]][read["name"]] = read

    def add(self, what: What, name: str, record: Mapping[str, Any]) -> None:
        """Something done."""
        line = {"what": what, "name": name, **record}
        self._done[what][name] = line
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, what: What, name: str) -> bool:
        """Whether it was done."""
        return name in self._done[what]

    def all(self, what: What) -> list[dict[str, Any]]:
        """In the order in which they were done."""
        return list(self._done[what].values())
