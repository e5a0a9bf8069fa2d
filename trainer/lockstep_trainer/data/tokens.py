"""Token shards, and streams of tokens over them: written once, then mapped from disk or read from a store by ranges.

    NAME.tokens           token ids, uint16 or uint32 little-endian, the end of text behind each document
    NAME.tokens.lengths   uint32 little-endian: tokens of each document, its end included
    NAME.tokens.json      ``ShardMeta``

This is the ``tokens`` format of a source, and what preparing text leaves in a pod.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lockstep_trainer.errors import StoreError, UserError
from lockstep_trainer.storage import ObjectStore

log = logging.getLogger(__name__)

_VERSION = 1
_REQUESTS = 8  # at once, of one worker: enough to hide the store's latency, fewer than boto3's connections
_PAUSES = (1.0, 2.0)
"""Seconds between tries of a read that the store did not answer. A longer outage is the trainer's to wait for, since it
can say that it does."""
_EMPTY = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class ShardMeta:
    """What ``NAME.tokens.json`` says."""

    version: int
    tokens: int
    documents: int
    width: int  # bytes of an id
    tokenizer: str  # SHA-256 of its tokenizer.json
    sha256: str  # of the ids, then of the lengths


class ShardWriter:
    """Writes one shard, document by document; use as a context manager."""

    def __init__(self, path: Path, width: int, tokenizer: str) -> None:
        self._path, self._width, self._tokenizer = path, width, tokenizer
        self._dtype = dtype_of(width)
        self._ids = path.open("wb")
        self._lengths = Path(f"{path}.lengths").open("wb")  # noqa: SIM115 (closed in __exit__)
        self._hashes = hashlib.sha256(), hashlib.sha256()
        self.tokens = self.documents = 0

    def add(self, ids: Sequence[int] | NDArray[np.integer]) -> None:
        """A document's ids, its end included."""
        for number, (file, data) in enumerate(
            ((self._ids, np.asarray(ids, self._dtype)), (self._lengths, np.array([len(ids)], "<u4")))
        ):
            file.write(data.tobytes())
            self._hashes[number].update(data.tobytes())
        self.tokens += len(ids)
        self.documents += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ids.close()
        self._lengths.close()
        if kind is None:
            digest = hashlib.sha256(b"".join(each.digest() for each in self._hashes)).hexdigest()
            meta = ShardMeta(_VERSION, self.tokens, self.documents, self._width, self._tokenizer, digest)
            Path(f"{self._path}.json").write_text(json.dumps(asdict(meta)))


def read_meta(data: bytes, where: str) -> ShardMeta:
    """A shard's meta; raises UserError where ``data`` is none."""
    try:
        meta = ShardMeta(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer.data.sources: {where} does not describe a token shard: {error}") from None
    if meta.version != _VERSION or meta.width not in (2, 4):
        raise UserError(
            f"trainer.data.sources: {where} is of version {meta.version}, and this trainer reads {_VERSION}; "
            "write the shards again with `lockstep data prepare`"
        )
    return meta


def dtype_of(width: int) -> np.dtype[np.unsignedinteger]:
    """The type of ids of ``width`` bytes."""
    return np.dtype("<u2" if width == 2 else "<u4")


def width_for(vocabulary: int) -> int:
    """Bytes of an id of a vocabulary."""
    return 2 if vocabulary <= 2**16 else 4


class Shard(Protocol):
    """Ids in one place."""

    @property
    def remote(self) -> bool:
        """Whether a read waits for a store."""
        ...

    def read(self, offset: int, length: int) -> NDArray[np.integer]:
        """``length`` ids from ``offset``."""
        ...


class LocalShard:
    """A shard mapped from disk."""

    remote = False

    def __init__(self, path: Path, width: int) -> None:
        # mmap refuses empty files
        empty = path.stat().st_size == 0
        self.ids: NDArray[np.unsignedinteger] = (
            np.empty(0, dtype_of(width)) if empty else np.memmap(path, dtype_of(width), mode="r")
        )

    def read(self, offset: int, length: int) -> NDArray[np.integer]:
        """``length`` ids from ``offset``."""
        return self.ids[offset : offset + length]


class RemoteShard:
    """A shard in a store, read by ranges."""

    remote = True

    def __init__(self, store: ObjectStore, key: str, width: int) -> None:
        self._store, self._key, self._width = store, key, width

    def read(self, offset: int, length: int) -> NDArray[np.integer]:
        """``length`` ids from ``offset``. Raises StoreError, not for an outage of a moment."""
        for pause in (*_PAUSES, None):
            try:
                data = self._store.get_range(self._key, offset * self._width, length * self._width)
                break
            except StoreError as error:
                if not error.temporary or pause is None:
                    raise
                log.warning("%s; trying again in %.0f s", error, pause)
                time.sleep(pause)
        if len(data) != length * self._width:
            raise UserError(
                f"trainer.data.sources: {self._store.uri}/{self._key} is shorter than its .json says; bring it back"
            )
        return np.frombuffer(data, dtype_of(self._width))


@dataclass(frozen=True, slots=True)
class Extents:
    """Which pieces of which shards make a stream, in order; each field is (extents,) int64."""

    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]

    @classmethod
    def whole(cls, lengths: Sequence[int]) -> Extents:
        """All of each shard."""
        return cls(np.arange(len(lengths)), np.zeros(len(lengths), np.int64), np.array(lengths, np.int64))


class TokenStream:
    """A row of tokens that lies in pieces of shards. Reading is safe from several threads."""

    def __init__(self, shards: Sequence[Shard], extents: Extents) -> None:
        self._shards, self._extents = tuple(shards), extents
        self._starts = np.concatenate([[0], np.cumsum(extents.length)]).astype(np.int64)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self._starts[-1])

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these ranges, end to end, (Σ lengths,)."""
        pieces: list[tuple[Shard, int, int]] = []
        firsts = np.searchsorted(self._starts, starts, side="right") - 1
        for start, length, first in zip(starts.tolist(), lengths.tolist(), firsts.tolist(), strict=True):
            at, left, extent = start, length, first
            while left:
                inside = at - int(self._starts[extent])
                count = min(left, int(self._extents.length[extent]) - inside)
                if count:
                    shard = self._shards[self._extents.shard[extent]]
                    pieces.append((shard, int(self._extents.offset[extent]) + inside, count))
                at, left, extent = at + count, left - count, extent + 1
        if any(shard.remote for shard, _, _ in pieces):
            found = list(self._requests().map(lambda piece: piece[0].read(*piece[1:]), pieces))
        else:
            found = [shard.read(offset, count) for shard, offset, count in pieces]
        return np.concatenate(found).astype(np.int64) if found else _EMPTY

    def close(self) -> None:
        """End the threads that read from a store."""
        with self._lock:
            if self._pool:
                self._pool.shutdown()
                self._pool = None

    def _requests(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="tokens")
            return self._pool
