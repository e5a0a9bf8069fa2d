"""A store that notes each read, and may fail some: for tests of what a restore asks for."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from lockstep_trainer.errors import StoreError
from lockstep_trainer.storage import ObjectStore


class CountedStore:
    """Passes everything on to ``store``; each read of ``rank`` is a line in ``log``, which ranks may share.

    Reads of keys that end with ``failing`` raise a temporary StoreError.
    """

    def __init__(self, store: ObjectStore, log: Path, rank: int = 0, failing: str | None = None) -> None:
        self._store, self._log, self._rank, self._failing = store, log, rank, failing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, key: str) -> tuple[bytes, str]:
        """As the store has it."""
        data, etag = self._store.get(key)
        self._note(key, 0, len(data))
        return data, etag

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """As the store has it."""
        self._note(key, offset, length)
        return self._store.get_range(key, offset, length)

    def get_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """As the store has it."""
        self._note(key, offset, sum(map(len, buffers)))
        return self._store.get_into(key, offset, *buffers)

    def _note(self, key: str, offset: int, length: int) -> None:
        line = json.dumps([self._rank, key, offset, length]) + "\n"
        with self._log.open("a") as file:  # short lines are appended whole, also by several processes
            file.write(line)
        if self._failing is not None and key.endswith(self._failing):
            raise StoreError(f"get {key}: away", temporary=True)


def reads(log: Path) -> list[tuple[int, str, int, int]]:
    """What was read: rank, key, offset, length."""
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def read_twice(log: Path) -> list[str]:
    """Keys of which a byte was read more than once."""
    by_key: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for _, key, offset, length in reads(log):
        by_key[key].append((offset, offset + length))
    twice = []
    for key, spans in by_key.items():
        spans.sort()
        if any(before[1] > after[0] for before, after in pairwise(spans)):
            twice.append(key)
    return twice
