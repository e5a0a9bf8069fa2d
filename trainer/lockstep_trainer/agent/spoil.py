"""A byte that flips in a snapshot in memory or in a checkpoint in the store, to see that nobody goes on from it.

Both have checksums; who reads one compares. Called in a thread.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep_trainer.checkpoint.snapshots import held, lock, order, rank_folder, read_plan, unlock
from lockstep_trainer.errors import TrainerError

if TYPE_CHECKING:
    from lockstep_trainer.checkpoint.chain import Chain

LARGEST_OBJECT = 1 << 30
"""Bytes of an object that is read and written again: it goes through the agent's memory."""


class NothingToSpoilError(TrainerError):
    """There is no such shard."""


def spoil_memory(root: Path, rank: int) -> str:
    """Flip a byte in the newest snapshot of ``rank`` in this pod's memory (``root``: ``snapshots``); a clause that says
    where. Raises NothingToSpoilError."""
    folder = rank_folder(root, rank)
    snapshots = sorted(held(folder).items(), key=lambda each: order(each[1].state), reverse=True)
    for number, snapshot in snapshots:
        plan = read_plan(folder, snapshot.plan)
        descriptor = os.open(folder / f"buffer-{number}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if not lock(descriptor, shared=True):
                continue  # it is being overwritten
            item = max(plan.items, key=lambda item: item.bytes)
            at = item.data + item.bytes // 2
            os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ 0x10]), at)
        finally:
            unlock(descriptor)
            os.close(descriptor)
        return f"a byte of {item.name} is flipped in its snapshot of step {snapshot.state.step} in memory"
    raise NothingToSpoilError(f"rank {rank} has no snapshot in this pod's memory yet; ask again behind the next one")


def spoil_store(chain: Chain, rank: int) -> str:
    """Flip a byte in the smallest data file of ``rank`` that the newest manifest names; a clause that says where.
    Raises NothingToSpoilError."""
    point = chain.newest()
    if point is None or "://" in point.manifest:
        raise NothingToSpoilError("this job has no checkpoint in its store yet; ask again behind the first one")
    manifest = chain.manifest(point)
    own = [file for file in manifest.files if file.name.startswith(f"__{rank}_") and file.size]
    if not own:
        raise NothingToSpoilError(f"{manifest.folder} has no data of rank {rank}; choose another rank")
    file = min(own, key=lambda file: file.size)
    if file.size > LARGEST_OBJECT:
        raise NothingToSpoilError(
            f"{file.name} of {manifest.folder} has {file.size} bytes; at most {LARGEST_OBJECT} are read and written "
            "again, so choose a smaller model"
        )
    key = f"{manifest.folder}/{file.name}"
    data = bytearray(chain.store.get(key)[0])
    data[len(data) // 2] ^= 0x10
    chain.store.put(key, bytes(data))
    return f"a byte of {key} is flipped in the store"
