"""Whoever reads JSON all day keeps none of its values: an agent runs for weeks."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lockstep_api.messages import Abandon, StateId, Term
from lockstep_api.wire import decode, encode
from lockstep_trainer.checkpoint.snapshots import Root, Snapshot
from lockstep_trainer.supervisor import write_json

TIMES = 500
VALUE_BYTES = 60
"""At least: what a string of sixteen characters takes in memory."""


def grown(read: Callable[[str], object]) -> int:
    """Bytes that are left behind by reading so many values that are never the same."""
    for number in range(3):  # what is made once
        read(f"{number:016}")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(3, TIMES):
            read(f"{number:016x}")
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_messages_leave_nothing_behind() -> None:
    assert grown(lambda value: decode(encode(Abandon("job", Term(1, 1), value)))) < TIMES * VALUE_BYTES / 4


def test_snapshots_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.json"
    plain = Snapshot(StateId(1, 1, 1), "plan", ("",), {}, Root(Term(1, 1), None), 0, None, 0.0, 0.0, 0.0)

    def read(value: str) -> object:
        own = value[::-1]  # no value that a message has brought
        write_json(path, replace(plain, crc64nvme=(own,), plan=own).to_json())
        found = Snapshot.read(path)
        assert found is not None
        return found

    assert grown(read) < TIMES * VALUE_BYTES / 4
