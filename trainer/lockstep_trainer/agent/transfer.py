"""A snapshot of one rank on its way between two agents: how it looks on the wire, and how it is taken in.

First a line of JSON, ``{"snapshot": {…}, "sizes": {"plan", "metadata", "samples", "buffer"}}``, then those four behind
one another. It counts as there only when every checksum was compared: the JSON beside the buffer is written last.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lockstep_api.messages import StateId
from lockstep_trainer.checkpoint.plan import Plan
from lockstep_trainer.checkpoint.snapshots import (
    NoSnapshotError,
    Reading,
    Snapshot,
    SnapshotBusyError,
    held,
    json_of,
    lock,
    order,
    reading,
)
from lockstep_trainer.errors import CheckpointError, Corrupt
from lockstep_trainer.storage.checksum import EMPTY, crc64nvme
from lockstep_trainer.supervisor import write_json, write_whole

CHUNK = 256 * 1024
"""Of 64 KiB to 1 MiB what costs least CPU, 1.9 s a gigabyte on both ends together with TLS; 1 MiB: 2.2 s."""
_LONGEST_LINE = 64 * 1024 * 1024
_SNAPSHOT = TypeAdapter(Snapshot)


class NoRoomError(CheckpointError):
    """No buffer may be taken for the copy at the moment, or the volume is full."""


def name_of(state: StateId) -> str:
    """How a path names a state."""
    return f"{state.step}-{state.epoch}-{state.generation}"


def state_named(name: str) -> StateId:
    """The other way; raises ValueError."""
    step, epoch, generation = map(int, name.split("-"))
    return StateId(step, epoch, generation)


async def send(reading: Reading) -> AsyncIterator[bytes]:
    """The wire form of a snapshot, in pieces."""
    plan = reading.plan.text.encode()
    metadata = reading.metadata.read_bytes() if reading.plan.metadata else b""
    samples = reading.samples.read_bytes() if reading.snapshot.samples is not None else b""
    sizes = {"plan": len(plan), "metadata": len(metadata), "samples": len(samples), "buffer": reading.plan.size}
    yield json.dumps({"snapshot": asdict(reading.snapshot), "sizes": sizes}).encode() + b"\n"
    for small in (plan, metadata, samples):
        if small:
            yield small
    for offset in range(0, reading.plan.size, CHUNK):
        yield bytes(reading.data[offset : offset + CHUNK])


class _Stream:
    """Reads pieces of a given size from chunks of any."""

    def __init__(self, chunks: AsyncIterator[bytes | memoryview]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    async def line(self) -> bytes:
        found = bytearray()
        while True:
            head, end, rest = bytes(await self._next()).partition(b"\n")
            found += head
            if end:
                self._rest = memoryview(rest)
                return bytes(found)
            if len(found) > _LONGEST_LINE:
                raise Corrupt("a copy of a snapshot begins with no line")

    async def exactly(self, size: int) -> bytes:
        found = bytearray()
        async for piece in self.pieces(size):
            found += piece
        return bytes(found)

    async def pieces(self, size: int) -> AsyncIterator[memoryview]:
        while size:
            chunk = await self._next()
            piece, self._rest = chunk[:size], chunk[size:]
            size -= len(piece)
            yield piece

    async def _next(self) -> memoryview:
        if self._rest:
            rest, self._rest = self._rest, memoryview(b"")
            return rest
        async for chunk in self._chunks:
            if chunk:
                return memoryview(chunk)
        raise Corrupt("a copy of a snapshot was cut off")


async def receive(
    chunks: AsyncIterator[bytes | memoryview],
    folder: Path,
    state: StateId,
    *,
    buffers: int,
    may_take: Callable[[StateId], bool],
) -> None:
    """Take a snapshot of ``state`` into one of the ``buffers`` of ``folder``: the one with the oldest state that
    ``may_take`` allows and nobody reads. Nothing is done where it is there already.

    Raises NoRoomError where no buffer may be taken, Corrupt where what came is not whole.
    """
    if any(snapshot.state == state for snapshot in held(folder).values()):
        return
    stream = _Stream(chunks)
    try:
        raw = json.loads(await stream.line())
        snapshot = _SNAPSHOT.validate_python(raw["snapshot"])
        sizes = {name: int(raw["sizes"][name]) for name in ("plan", "metadata", "samples", "buffer")}
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise Corrupt(f"a copy of a snapshot begins with something else: {error}") from None
    plan = Plan.from_json((await stream.exactly(sizes["plan"])).decode(), "the plan of a copy")
    if snapshot.state != state or plan.key != snapshot.plan or plan.size != sizes["buffer"]:
        raise Corrupt(f"a copy of step {state.step} speaks of something else")
    metadata, samples = await stream.exactly(sizes["metadata"]), await stream.exactly(sizes["samples"])
    folder.mkdir(parents=True, exist_ok=True)
    number, descriptor = _take(folder, buffers, may_take)
    try:
        json_of(folder, number).unlink(missing_ok=True)
        _make_room(descriptor, plan.size, folder)
        offset = 0
        async for piece in stream.pieces(plan.size):
            os.pwrite(descriptor, piece, offset)
            offset += len(piece)
        await asyncio.to_thread(_verify, descriptor, plan, snapshot)
        write_whole(folder / f"plan-{plan.key}.json", plan.text.encode())
        if plan.metadata:
            write_whole(folder / f"metadata-{plan.key}", metadata)
        if snapshot.samples is not None:
            write_whole(folder / f"samples-{number}.jsonl", samples)
        write_json(json_of(folder, number), snapshot.to_json())
    finally:
        os.close(descriptor)


def has_room(folder: Path, buffers: int, may_take: Callable[[StateId], bool]) -> bool:
    """Whether ``receive`` would find a buffer, were none of them read at the moment."""
    there = held(folder)
    return any(number not in there or may_take(there[number].state) for number in range(buffers))


def _take(folder: Path, buffers: int, may_take: Callable[[StateId], bool]) -> tuple[int, int]:
    """A buffer and its locked descriptor."""
    there = held(folder)
    numbers = [number for number in range(buffers) if number not in there or may_take(there[number].state)]
    numbers.sort(key=lambda number: order(there[number].state) if number in there else (0, 0, 0))
    for number in numbers:
        descriptor = os.open(folder / f"buffer-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if lock(descriptor, shared=False):
            return number, descriptor
        os.close(descriptor)
    raise NoRoomError(f"{folder}: each buffer holds what must stay, or is being read")


def _make_room(descriptor: int, size: int, folder: Path) -> None:
    try:
        os.ftruncate(descriptor, size)
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.ftruncate(descriptor, 0)
        raise NoRoomError(f"{folder}: the volume has no room for a copy of {size} bytes") from None


def discard_if_damaged(folder: Path, state: StateId) -> bool:
    """Compare the rank's own snapshot of ``state`` with its checksums, and remove it where they differ; True: it is not
    there any more. Takes as long as reading it."""
    try:
        with reading(folder, state) as own:
            try:
                _compare(lambda start, length: crc64nvme(own.data[start : start + length]), own.plan, own.snapshot)
            except Corrupt:
                json_of(own.folder, own.number).unlink(missing_ok=True)
                return True
    except SnapshotBusyError:
        return False
    except NoSnapshotError:
        return True
    except Corrupt:  # not even its plan is right
        for number, snapshot in held(folder).items():
            if snapshot.state == state:
                json_of(folder, number).unlink(missing_ok=True)
        return True
    return False


def _verify(descriptor: int, plan: Plan, snapshot: Snapshot) -> None:
    memory = memoryview(bytearray(CHUNK))  # one that stays in a core's cache: new memory would cost more than reading

    def checksum(offset: int, length: int) -> str:
        found, end = EMPTY, offset + length
        while offset < end:
            count = os.preadv(descriptor, [memory[: end - offset]], offset)
            if not count:
                raise Corrupt("a copy of a snapshot was cut off")
            found, offset = crc64nvme(memory[:count], found), offset + count
        return found

    _compare(checksum, plan, snapshot)


def _compare(checksum: Callable[[int, int], str], plan: Plan, snapshot: Snapshot) -> None:
    if len(snapshot.crc64nvme) != len(plan.items):
        raise Corrupt("a copy of a snapshot names other pieces than its plan")
    for item, expected in zip(plan.items, snapshot.crc64nvme, strict=True):
        if checksum(item.offset, item.length) != expected:
            raise Corrupt(f"a copy of step {snapshot.state.step}: {item.name} differs from its checksum")
