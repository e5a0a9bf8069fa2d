"""The buffers that a worker writes its snapshots to: which one is free, and whether there is room for them.

See ``snapshots`` for what readers see of them.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lockstep_api.messages import StateId
from lockstep_trainer.checkpoint.plan import Plan
from lockstep_trainer.checkpoint.snapshots import (
    BUFFERS,
    COPIES,
    UPLOADING,
    Snapshot,
    json_of,
    lock,
    numbers_in,
    order,
    read_state,
    unlock,
)
from lockstep_trainer.errors import UserError
from lockstep_trainer.supervisor import write_json, write_whole

_GIB = 1024**3


class Buffer:
    """One buffer file, mapped for as long as the worker lives."""

    def __init__(self, folder: Path, number: int, size: int) -> None:
        """Makes the file and its room where they are missing; raises UserError where the volume is full."""
        self.folder, self.number = folder, number
        self._descriptor = os.open(folder / f"buffer-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.size = size
        self.memory: mmap.mmap | None = None

    def take(self) -> bool:
        """Lock it for writing, without waiting; False where somebody reads it."""
        return lock(self._descriptor, shared=False)

    def map(self) -> bool:
        """Behind ``take``: forget what it holds, and map it. True where it was mapped before by this worker, and what
        stands between the numbers is in place."""
        json_of(self.folder, self.number).unlink(missing_ok=True)
        if self.memory is not None:
            return True
        os.ftruncate(self._descriptor, 0)  # what another layout left between the numbers
        try:
            os.posix_fallocate(self._descriptor, 0, self.size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"checkpoint.memory: no room for a buffer of {self.size / _GIB:.2f} GiB in {self.folder}; give the "
                "run volume of the pod more memory, or spread the model over more pods"
            ) from None
        self.memory = mmap.mmap(self._descriptor, self.size)
        return False

    def whole(self, snapshot: Snapshot) -> None:
        """Say what it holds, and let go of it."""
        write_json(json_of(self.folder, self.number), snapshot.to_json())
        self.let_go()

    def let_go(self) -> None:
        """Give the lock back."""
        unlock(self._descriptor)

    def close(self) -> None:
        """Let go of the file, which stays. The mapping goes with the last tensor over it."""
        self.memory = None
        os.close(self._descriptor)

    def held(self) -> Snapshot | None:
        """What it holds; None where nothing whole."""
        return Snapshot.read(json_of(self.folder, self.number))


class Buffers:
    """All buffers of one rank."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Writes the plan into ``folder``; buffers are made when they are first used."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.plan = folder, plan
        path = folder / f"plan-{plan.key}.json"
        if not path.exists():
            write_whole(path, plan.text.encode())
        self._buffers = [Buffer(folder, number, plan.size) for number in range(BUFFERS)]

    @property
    def all(self) -> tuple[Buffer, ...]:
        """Each of them, used or not."""
        return tuple(self._buffers)

    def reserve(self, is_protected: Callable[[StateId], bool]) -> Buffer | None:
        """The buffer for the next snapshot, locked; None where each is read or must stay. The oldest goes first, and
        behind all others the one whose state is being uploaded: between two tries nobody reads it."""
        uploading = read_state(self.folder.parent / UPLOADING)
        holding = [(buffer, buffer.held()) for buffer in self._buffers]
        free = [pair for pair in holding if pair[1] is None or not is_protected(pair[1].state)]
        free.sort(
            key=lambda pair: (pair[1].state == uploading, order(pair[1].state)) if pair[1] else (False, (0, 0, 0))
        )
        return next((buffer for buffer, _ in free if buffer.take()), None)

    def fresh(self, is_protected: Callable[[StateId], bool]) -> Iterator[Buffer]:
        """Each buffer that this worker has not mapped yet and that may be overwritten, locked while it is looked at."""
        for buffer in self._buffers:
            held = buffer.held()
            if buffer.memory is None and (held is None or not is_protected(held.state)) and buffer.take():
                try:
                    yield buffer
                finally:
                    buffer.let_go()

    def remove_unused(self) -> None:
        """Remove plans and buffers that no snapshot needs: those of another layout of this rank."""
        held = [buffer.held() for buffer in self._buffers]
        needed = {self.plan.key, *(snapshot.plan for snapshot in held if snapshot)}
        for path in self.folder.iterdir():
            kind, _, rest = path.name.partition("-")
            if kind in ("plan", "metadata") and rest.removesuffix(".json") not in needed:
                path.unlink(missing_ok=True)
        for number in numbers_in(self.folder):
            if number >= BUFFERS:
                (self.folder / f"buffer-{number}").unlink(missing_ok=True)


def in_memory(folder: Path) -> bool:
    """Whether a folder lies in memory, as a pod's run volume does and the folder of a local run may not."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")  # proc(5): … major:minor root mountpoint … - type source options
        if fields.split()[2] == number:
            return kind.split()[0] in ("tmpfs", "ramfs", "hugetlbfs")
    return False


def check_room(folder: Path, sizes: list[int], *, buddy: bool, limit: int | None) -> None:
    """Raise UserError where the snapshots of a pod do not fit, before the first step. ``sizes``: bytes of a buffer of
    each of its ranks; ``limit``: checkpoint.memory.limit in bytes."""
    each = BUFFERS + (COPIES if buddy else 0)
    needed = each * sum(sizes)
    what = (
        f"snapshots in memory need {needed / _GIB:.2f} GiB of a pod: {each} buffers of {max(sizes) / _GIB:.2f} GiB for "
        f"each of its {len(sizes)} ranks"
    )
    ways = (
        "; ways out: more pods or wider sharding (parallelism.shard), "
        + ("checkpoint.memory.buddy: false, " if buddy else "")
        + "more memory for the pod"
    )
    if limit is not None and needed > limit:
        raise UserError(
            f"checkpoint.memory.limit: {what}; the limit is {limit / _GIB:.2f} GiB{ways} and a higher "
            "checkpoint.memory.limit"
        )
    room = os.statvfs(folder)
    there = sum(path.stat().st_blocks * 512 for path in folder.rglob("buffer-*") if path.is_file())
    free = room.f_bavail * room.f_frsize + there
    if needed > free:
        raise UserError(f"checkpoint.memory.limit: {what}; the run volume has {free / _GIB:.2f} GiB for them{ways}")
