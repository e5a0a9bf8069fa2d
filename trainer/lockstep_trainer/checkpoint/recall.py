"""Restores a rank's state from a snapshot in the memory of its own pod."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lockstep_api.messages import StateId
from lockstep_trainer.checkpoint.planning import Planned
from lockstep_trainer.checkpoint.snapshots import Reading, Snapshot, held, reading
from lockstep_trainer.errors import Corrupt
from lockstep_trainer.storage.checksum import crc64nvme


def recall(folder: Path, planned: Planned, state: StateId, targets: Sequence[Tensor]) -> tuple[Snapshot, str]:
    """Copy the snapshot of ``state`` in ``folder`` into ``targets`` (``Planned.sources``); returns what it says and its
    sample log.

    No byte is copied before its checksum was looked at. Raises NoSnapshotError where there is none, Corrupt where a
    byte is wrong or another layout made it; ``targets`` are then worthless.
    """
    with reading(folder, state, wait=True) as held:
        if held.plan.key != planned.plan.key:
            raise Corrupt(f"{held.buffer} was made at another layout than this job has now")
        for number, target in enumerate(targets):
            _copy(held, number, target)
        log = held.samples.read_text() if held.snapshot.samples is not None else ""
        return held.snapshot, log


def costs_of(folder: Path, state: StateId) -> Sequence[float] | None:
    """What the pipeline was split by that made the snapshot of ``state`` in ``folder`` (``Listing.costs``); None where
    there is no such snapshot, or it does not say."""
    found = (snapshot for snapshot in held(folder).values() if snapshot.state == state)
    return next((snapshot.header.get("costs") for snapshot in found), None)


def _copy(held: Reading, number: int, target: Tensor) -> None:
    item = held.plan.items[number]
    if crc64nvme(held.data[item.offset : item.offset + item.length]) != held.snapshot.crc64nvme[number]:
        raise Corrupt(f"{held.buffer}: {item.name} differs from its checksum")
    if item.bytes:
        numbers = held.data[item.data : item.data + item.bytes]
        with torch.no_grad():
            target.copy_(torch.frombuffer(numbers, dtype=getattr(torch, item.dtype)).view(item.shape))
