"""Reads of a restore, made in threads ahead of their use, in bounded memory; nothing unverified leaves a thread."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from lockstep_trainer.checkpoint.archive import Alike
from lockstep_trainer.checkpoint.arena import Arena
from lockstep_trainer.checkpoint.fetch import Item, Read
from lockstep_trainer.checkpoint.homes import Home, homes
from lockstep_trainer.checkpoint.manifest import METADATA
from lockstep_trainer.checkpoint.pieces import Targets, cut
from lockstep_trainer.errors import Corrupt, NotFound
from lockstep_trainer.storage import ObjectStore
from lockstep_trainer.storage.checksum import EMPTY, crc64nvme

_READS = 8  # at once, per rank: as many connections; fewer where there are no processors to serve them


@dataclass(frozen=True, slots=True)
class Arrived:
    """A read whose bytes were verified, and put where this rank wants them."""

    read: Read
    tensors: dict[int, Tensor]  # by item; none where no other rank needs anything of it


class Ahead:
    """Reads in order, ahead of their use, as far as ``max_bytes`` of buffers allow. A read that is larger is alone.

    A buffer is needed for what does not go straight to its place (``homes``), and only until the thread has put it
    there; where other ranks need something of it, until ``done``.
    """

    def __init__(
        self,
        store: ObjectStore,
        folder: str,
        reads: Sequence[Read],
        items: Mapping[int, Item],
        checksums: Mapping[int, str],
        *,
        targets: Targets,
        max_bytes: int,
    ) -> None:
        self._store, self._folder, self._items, self._checksums = store, folder, items, checksums
        self._targets, self._alike = targets, Alike()
        self._homes = homes((number for read in reads for number in read.items), items, targets)
        self._changed = Condition()
        self._arena = Arena(max_bytes)
        self._waiting = deque((read, Future[tuple[Arrived, memoryview | None]]()) for read in reads)
        self._coming = deque(future for _, future in self._waiting)
        self._taken: list[memoryview] = []
        self._closed = False
        self._threads = min(_READS, 2 * len(os.sched_getaffinity(0)), len(reads))
        self._pool = ThreadPoolExecutor(max(1, self._threads), thread_name_prefix="restore")

    def __enter__(self) -> Self:
        for _ in range(self._threads):
            self._pool.submit(self._work)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)

    def take(self, number: int) -> list[Arrived]:
        """The next ``number`` reads, together within half of ``max_bytes``; waits for them. Raises Corrupt,
        StoreError."""
        found = []
        for _ in range(number):
            arrived, buffer = self._coming.popleft().result()
            if buffer is not None:
                self._taken.append(buffer)
            found.append(arrived)
        return found

    def done(self) -> None:
        """What was taken is no longer needed."""
        self._give_back(self._taken)
        self._taken = []

    # --- in the threads ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (order := self._next()) is not None:
            read, future, buffer = order
            try:
                with torch.no_grad():
                    arrived = self._read(read, buffer)
            except BaseException as error:
                self._give_back([buffer])
                future.set_exception(error)
                continue
            if not arrived.tensors:
                self._give_back([buffer])
            future.set_result((arrived, buffer if arrived.tensors else None))

    def _next(self) -> tuple[Read, Future[tuple[Arrived, memoryview | None]], memoryview] | None:
        """The next read and its buffer; waits for memory. None where there is nothing left to do."""
        with self._changed:
            while self._waiting and not self._closed:
                read, future = self._waiting[0]
                size = read.length - sum(home.size for number in read.items if (home := self._homes.get(number)))
                buffer = self._arena.lend(size)
                if buffer is not None:
                    self._waiting.popleft()
                    return read, future, buffer
                self._changed.wait()
            return None

    def _give_back(self, buffers: Sequence[memoryview]) -> None:
        with self._changed:
            for buffer in buffers:
                self._arena.give_back(buffer)
            self._changed.notify_all()

    def _read(self, read: Read, buffer: memoryview) -> Arrived:
        where = f"{self._store.uri}/{self._folder}/{read.file}"
        views, archives = _laid_out(read, buffer, self._items, self._homes)
        try:
            there = self._store.get_into(f"{self._folder}/{read.file}", read.offset, *views)
        except NotFound:
            raise Corrupt(f"{where} is missing") from None
        tensors = {}
        for number, parts in zip(read.items, archives, strict=True):
            item = self._items[number]
            what = f"{where}: bytes {item.offset}+{item.length}"
            if item.offset + item.length > read.offset + there:
                raise Corrupt(f"{what} are not there: the file is shorter")
            checksum = EMPTY
            for part in parts:
                checksum = crc64nvme(part, checksum)
            if checksum != self._checksums[number]:
                raise Corrupt(f"{what} differ from their checksum")
            tensors[number] = self._put(number, parts, what)
        return Arrived(read, tensors if read.parcels else {})

    def _put(self, number: int, parts: tuple[memoryview, ...], what: str) -> Tensor:
        """Copy an item, verified, to where this rank wants it; returns its tensor."""
        item, home = self._items[number], self._homes.get(number)
        if home is not None and home.fits(parts[0], parts[-1]):
            tensor = home.tensor
        else:
            data = parts[0] if home is None else memoryview(bytearray().join(parts))
            tensor = self._alike.tensor_in(data, item.dtype, item.shape, what)
        if (tensor.dtype, tuple(tensor.shape)) != (item.dtype, item.shape):
            raise Corrupt(f"{what} hold {_text(tensor)}, and {METADATA} says {_text(item)}")
        for box, places in self._targets.get(number, {}).items():
            for place in places:
                if place is not tensor:
                    place.copy_(cut(tensor, box))
        return tensor


def _laid_out(
    read: Read, buffer: memoryview, items: Mapping[int, Item], homes: Mapping[int, Home]
) -> tuple[list[memoryview], list[tuple[memoryview, ...]]]:
    """Where the bytes of a read go: what to read into, in the order of the file, and the parts of each item."""
    views: list[memoryview] = []
    archives: list[tuple[memoryview, ...]] = []
    begin = 0  # in the buffer, of what no view has yet
    home_bytes = 0  # so far
    for number in read.items:
        item, home = items[number], homes.get(number)
        start = item.offset - read.offset - home_bytes
        if home is None:
            archives.append((buffer[start : start + item.length],))
            continue
        numbers, end = home.memory, start + home.head
        archives.append((buffer[start:end], numbers, buffer[end : end + home.tail]))
        views += [buffer[begin:end], numbers]
        begin, home_bytes = end, home_bytes + home.size
    views.append(buffer[begin : read.length - home_bytes])
    return views, archives


def _text(tensor: Tensor | Item) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
