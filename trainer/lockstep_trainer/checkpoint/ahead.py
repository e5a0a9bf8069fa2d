"""Reads of a restore, made in threads ahead of their use, in bounded memory; nothing unverified leaves a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import Tensor

from lockstep_trainer.checkpoint.archive import tensor_in
from lockstep_trainer.checkpoint.fetch import Item, Read
from lockstep_trainer.checkpoint.manifest import METADATA
from lockstep_trainer.errors import Corrupt, NotFound
from lockstep_trainer.storage import ObjectStore
from lockstep_trainer.storage.checksum import crc64nvme

_READS = 4  # at once, per rank


@dataclass(frozen=True, slots=True)
class Arrived:
    """A read whose bytes were verified."""

    read: Read
    tensors: dict[int, Tensor]  # by item


class Ahead:
    """Reads in order, ahead of their use, as far as ``max_bytes`` allow: what is read or being read counts until
    ``done``. A read that is larger is alone."""

    def __init__(
        self,
        store: ObjectStore,
        folder: str,
        reads: Sequence[Read],
        items: Mapping[int, Item],
        checksums: Mapping[int, str],
        *,
        max_bytes: int,
    ) -> None:
        self._store, self._folder, self._items, self._checksums = store, folder, items, checksums
        self._waiting = deque(reads)
        self._pending: deque[Future[Arrived]] = deque()
        self._held = 0  # bytes
        self._taken = 0  # bytes, of those held
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(_READS, thread_name_prefix="restore")

    def __enter__(self) -> Self:
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, number: int) -> list[Arrived]:
        """The next ``number`` reads, together within ``max_bytes``; waits for them. Raises Corrupt, StoreError."""
        found = []
        for _ in range(number):
            arrived = self._pending.popleft().result()
            self._taken += arrived.read.length
            found.append(arrived)
        return found

    def done(self) -> None:
        """What was taken is no longer needed."""
        self._held -= self._taken
        self._taken = 0
        self._fill()

    def _fill(self) -> None:
        while self._waiting and (not self._held or self._held + self._waiting[0].length <= self._max_bytes):
            read = self._waiting.popleft()
            self._held += read.length
            self._pending.append(self._pool.submit(self._read, read))

    def _read(self, read: Read) -> Arrived:
        where = f"{self._store.uri}/{self._folder}/{read.file}"
        data = memoryview(bytearray(read.length))
        try:
            there = self._store.get_into(f"{self._folder}/{read.file}", read.offset, data)
        except NotFound:
            raise Corrupt(f"{where} is missing") from None
        tensors = {}
        for number in read.items:
            item = self._items[number]
            what = f"{where}: bytes {item.offset}+{item.length}"
            piece = data[item.offset - read.offset :][: item.length]
            if item.offset + item.length > read.offset + there:
                raise Corrupt(f"{what} are not there: the file is shorter")
            if crc64nvme(piece) != self._checksums[number]:
                raise Corrupt(f"{what} differ from their checksum")
            tensor = tensors[number] = tensor_in(piece, what)
            if (tensor.dtype, tuple(tensor.shape)) != (item.dtype, item.shape):
                raise Corrupt(f"{what} hold {_text(tensor)}, and {METADATA} says {_text(item)}")
        return Arrived(read, tensors)


def _text(tensor: Tensor | Item) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
