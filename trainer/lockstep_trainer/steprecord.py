"""Step records: how a worker tells its agent what it does, without a system call.

A worker maps a file of the memory-backed run folder and writes one fixed-size record per optimizer step into a ring;
its agent maps the same file and reads. The header also holds the section the worker is in (``forward``,
``checkpoint``, …): one byte, stored at each change, so that an observer knows where a silent worker is.

Layout, little-endian::

    0     magic, capacity, record size, records written so far, section, number of section names
    64    32 section names of 24 bytes, UTF-8, zero padded
    1024  ring of `capacity` records: index, step, at, seconds, loss, tokens, grad_norm, lr, trained, mfu, memory,
          own work (compute, tokens, squares, product, copy, host, garbage, throttled, 4 × waited, peer, link, clock),
          32 × seconds, CRC-32

The checksum covers the record's index too. A reader that meets a half-written or overwritten slot sees a checksum or
an index that does not fit and tries again later; that holds on machines that reorder stores as well.
Standard library only: both sides import it at start.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MAGIC = b"LKSTEPS4"
MAX_SECTIONS = 32
STARTING = "starting"
"""Section of a worker that has not named one yet."""

_HEADER = struct.Struct("<8sIIQBB")
_COUNT = struct.Struct("<Q")
_COUNT_OFFSET, _SECTION_OFFSET, _SECTIONS_OFFSET = 16, 24, 25
_NAMES_OFFSET, _NAME_BYTES = 64, 24
_RING_OFFSET = 1024
DIMENSIONS = ("data", "pipeline", "tensor", "context")
"""Of the mesh, in the order of what is waited in them."""
_OWN = "dQQdddddddddqdd"
_FIELDS = struct.Struct(f"<QQdddQddQdQ{_OWN}{MAX_SECTIONS}d")
_CRC = struct.Struct("<I")
_NO_WORK = (math.nan, 0, 0, *[math.nan] * 9, -1, math.nan, math.nan)
_RECORD_BYTES = _FIELDS.size + 8  # the checksum, padded so that records stay aligned


@dataclass(frozen=True, slots=True)
class OwnStep:
    """One rank's own work in a step: waiting for other ranks is left out."""

    compute: float
    """Seconds in its windows of computation (``ownwork``)."""
    tokens: int
    """Tokens it computed."""
    squares: int
    """Σ length² over the documents it computed."""
    product: float | None = None
    """Seconds of the matrix product by which the device is measured; None where it was not measured since the last
    step."""
    copy: float | None = None
    """The same for the copy within the device's memory."""
    host: float = 0.0
    """Seconds that its device waited because its host stood still."""
    garbage: float = 0.0
    """Of the host's standstill: seconds that it collected garbage."""
    throttled: float = 0.0
    """Seconds that a quota held up its control group's processes, over all CPUs."""
    waited: dict[str, float] = field(default_factory=dict)
    """Dimension of the mesh → seconds in its collectives (``waits``), where they are measured."""
    peer: int | None = None
    """The rank that it exchanged data with since the last step; None for none."""
    link: float | None = None
    """Seconds that this took."""
    clock: float | None = None
    """MHz that its device runs at; None where it is not known."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step of one rank."""

    step: int
    at: float
    """Unix seconds at its end."""
    seconds: float
    """Wall time."""
    loss: float
    """Nats per token, over the global batch."""
    tokens: int
    """Over all ranks."""
    grad_norm: float
    lr: float
    sections: dict[str, float]
    """Section → seconds."""
    trained: int = 0
    """Tokens of all steps up to this one; 0: not said."""
    mfu: float | None = None
    """Model FLOPs utilisation of the step, 0 to 1; None where the device's peak is not known."""
    memory: int = 0
    """Bytes that the rank's device had in use at most during the step; 0 without a GPU."""
    own: OwnStep | None = None
    """None where its own work is not measured."""


class StepRecordError(ValueError):
    """The file holds no step records of this version."""


class StepWriter:
    """The worker's end."""

    def __init__(self, memory: mmap.mmap, capacity: int) -> None:
        self._memory = memory
        self._capacity = capacity
        self._written = 0
        self._sections: dict[str, int] = {}

    @classmethod
    def create(cls, path: Path, capacity: int = 512) -> Self:
        """Make the file, or make it anew. Readers never see it half made: it appears by rename."""
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.ftruncate(descriptor, _RING_OFFSET + capacity * _RECORD_BYTES)
            memory = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        _HEADER.pack_into(memory, 0, MAGIC, capacity, _RECORD_BYTES, 0, 0, 0)
        writer = cls(memory, capacity)
        writer.section(STARTING)
        os.replace(fresh, path)
        return writer

    def section(self, name: str) -> None:
        """Say where the worker is. A new name costs a few stores, a known one a single byte.

        Raises ValueError where the name is longer than 24 bytes or is the 33rd.
        """
        index = self._sections.get(name)
        self._memory[_SECTION_OFFSET] = self._register(name) if index is None else index

    def record(
        self,
        *,
        step: int,
        at: float,
        seconds: float,
        loss: float,
        tokens: int,
        grad_norm: float,
        lr: float,
        sections: dict[str, float],
        trained: int = 0,
        mfu: float | None = None,
        memory: int = 0,
        own: OwnStep | None = None,
    ) -> None:
        """Write one step's record; the oldest of a full ring is overwritten."""
        spent = [0.0] * MAX_SECTIONS
        for name, value in sections.items():
            index = self._sections.get(name)
            spent[self._register(name) if index is None else index] = value
        work = _own_fields(own) if own is not None else _NO_WORK
        fields = _FIELDS.pack(
            self._written, step, at, seconds, loss, tokens, grad_norm, lr, trained, _or_nan(mfu), memory, *work, *spent
        )
        offset = _RING_OFFSET + self._written % self._capacity * _RECORD_BYTES
        self._memory[offset : offset + _FIELDS.size] = fields
        _CRC.pack_into(self._memory, offset + _FIELDS.size, zlib.crc32(fields))
        self._written += 1
        _COUNT.pack_into(self._memory, _COUNT_OFFSET, self._written)

    def close(self) -> None:
        """Unmap the file; it stays."""
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _register(self, name: str) -> int:
        encoded = name.encode()
        index = len(self._sections)
        if len(encoded) > _NAME_BYTES:
            raise ValueError(f"section name {name!r} is longer than {_NAME_BYTES} bytes; shorten it")
        if index == MAX_SECTIONS:
            raise ValueError(f"section {name!r} is one too many: a worker may name {MAX_SECTIONS}")
        offset = _NAMES_OFFSET + index * _NAME_BYTES
        self._memory[offset : offset + _NAME_BYTES] = encoded.ljust(_NAME_BYTES, b"\0")
        self._sections[name] = index
        self._memory[_SECTIONS_OFFSET] = len(self._sections)
        return index


class StepReader:
    """The agent's end. It may be opened late or again: a new reader gets whatever is still in the ring."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError while the worker has not made the file, StepRecordError where it is another."""
        with path.open("rb") as file:
            try:
                self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            except ValueError:
                raise StepRecordError(f"{path} is empty") from None
        magic, capacity, record_bytes, *_ = (
            _HEADER.unpack_from(self._memory) if len(self._memory) >= _RING_OFFSET else (b"", 0, 0)
        )
        if magic != MAGIC or record_bytes != _RECORD_BYTES:
            raise StepRecordError(f"{path} holds no step records of this version")
        self._capacity: int = capacity
        self._next = 0
        self._names: list[str] = []
        self.lost = 0
        """Records that were overwritten before they were read."""

    @property
    def section(self) -> str:
        """Where the worker is now."""
        index = self._memory[_SECTION_OFFSET]
        names = self._section_names()
        return names[index] if index < len(names) else STARTING

    def new_records(self) -> list[StepRecord]:
        """Records written since the last call, oldest first. What is torn is left for the next call."""
        (written,) = _COUNT.unpack_from(self._memory, _COUNT_OFFSET)
        oldest = max(0, written - self._capacity)
        if self._next < oldest:
            self.lost += oldest - self._next
            self._next = oldest
        records: list[StepRecord] = []
        while self._next < written:
            record = self._read(self._next)
            if record is None:
                break
            records.append(record)
            self._next += 1
        return records

    def close(self) -> None:
        """Unmap the file."""
        self._memory.close()

    def _read(self, index: int) -> StepRecord | None:
        offset = _RING_OFFSET + index % self._capacity * _RECORD_BYTES
        raw = self._memory[offset : offset + _FIELDS.size + _CRC.size]
        fields = raw[: _FIELDS.size]
        (checksum,) = _CRC.unpack_from(raw, _FIELDS.size)
        found, step, at, seconds, loss, tokens, grad_norm, lr, trained, mfu, memory, *rest = _FIELDS.unpack(fields)
        if found != index or zlib.crc32(fields) != checksum:
            return None
        own, spent = _own_step(rest[: len(_OWN)]), rest[len(_OWN) :]
        sections = {name: value for name, value in zip(self._section_names(), spent, strict=False) if value}
        return StepRecord(step, at, seconds, loss, tokens, grad_norm, lr, sections, trained, _or_none(mfu), memory, own)

    def _section_names(self) -> list[str]:
        known = self._memory[_SECTIONS_OFFSET]
        while len(self._names) < known:
            offset = _NAMES_OFFSET + len(self._names) * _NAME_BYTES
            raw = self._memory[offset : offset + _NAME_BYTES]
            self._names.append(raw.rstrip(b"\0").decode(errors="replace"))
        return self._names


def _own_fields(own: OwnStep) -> tuple[float, ...]:
    measured = (_or_nan(own.product), _or_nan(own.copy))
    waited = (own.waited.get(name, math.nan) for name in DIMENSIONS)
    link = (-1 if own.peer is None else own.peer, _or_nan(own.link), _or_nan(own.clock))
    return (own.compute, own.tokens, own.squares, *measured, own.host, own.garbage, own.throttled, *waited, *link)


def _own_step(fields: Sequence[Any]) -> OwnStep | None:
    compute, tokens, squares, product, copy, host, garbage, throttled, *waits, peer, link, clock = fields
    if math.isnan(compute):
        return None
    return OwnStep(
        compute,
        tokens,
        squares,
        _or_none(product),
        _or_none(copy),
        host,
        garbage,
        throttled,
        waited={name: value for name, value in zip(DIMENSIONS, waits, strict=True) if not math.isnan(value)},
        peer=_peer(peer),
        link=_or_none(link),
        clock=_or_none(clock),
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _peer(rank: int) -> int | None:
    return None if rank < 0 else rank


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
