"""What a worker leaves in its folder for its agent, besides step records: lines and small documents."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Outbox:
    """Files of one worker. Lines are appended whole; documents appear by rename, so a reader never sees half of one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def event(self, kind: str, **fields: Any) -> None:
        """A line in ``events.jsonl``, which goes into the run's journal."""
        self._append("events.jsonl", {"kind": kind, "at": time.time(), **fields})

    def samples(self, line: str) -> None:
        """A line in ``samples.jsonl``: the ids that one step consumed."""
        self._append_text("samples.jsonl", line)

    def error(self, message: str, *, user_error: bool) -> None:
        """Why this worker ends on purpose."""
        self._replace("error.json", json.dumps({"message": message, "user_error": user_error}).encode())

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self._append_text(name, json.dumps(line))

    def _append_text(self, name: str, line: str) -> None:
        # One unbuffered write: a kill between two lines leaves no half of one.
        handle = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode() + b"\n")
        finally:
            os.close(handle)

    def _replace(self, name: str, data: bytes) -> None:
        temporary = self._folder / f".{name}"
        temporary.write_bytes(data)
        temporary.replace(self._folder / name)
