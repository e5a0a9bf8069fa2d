"""What lies where in a rank's snapshot buffers: made once in a generation, the same for every snapshot.

The buffer is the rank's checkpoint files, one behind the other, each as torch's distributed checkpoint has it: tensors
saved with ``torch.save``, and behind the files, raw, the pieces that this rank has and another one writes.

No torch here: agents read plans too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

from lockstep_trainer.errors import Corrupt

ALIGNMENT = 64  # bytes: where an archive begins, and with it its numbers
FILE_BYTES = 256 * 1024**2
"""A file is closed when it is as large: far below the 5 TiB of S3, and enough of them to upload in parallel."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of the step folder."""

    name: str
    offset: int  # within the buffer
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Item:
    """One piece of a tensor: a range that a reader may ask for, or, where ``file`` is None, a piece of its own memory.

    ``offset`` and ``length`` are the whole range within the buffer, ``data`` and ``bytes`` the numbers in it.
    """

    name: str
    file: int | None
    offset: int
    length: int
    data: int
    bytes: int
    dtype: str  # of torch, without ``torch.``
    shape: tuple[int, ...]
    start: tuple[int, ...]  # where the piece begins in the whole tensor


@dataclass(frozen=True)
class Plan:
    """All of one rank's buffer."""

    rank: int
    world_size: int
    layout: dict[str, int]
    files: tuple[PlannedFile, ...]
    items: tuple[Item, ...]  # those of the files first, then the local ones
    size: int  # bytes of the buffer
    metadata: bool  # ``metadata-<key>`` lies beside it: rank 0's

    @staticmethod
    def from_json(text: str, where: str) -> Plan:
        """Read it back; raises Corrupt, naming ``where`` it was found. The same text gives the same object: a plan
        comes with every snapshot of a generation, and reading it takes longer than a small copy."""
        try:
            return _read(text)
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{where} is no plan of a snapshot: {error}") from None

    @cached_property
    def text(self) -> str:
        """The plan as JSON: one text for one plan."""
        return json.dumps(asdict(self), sort_keys=True)

    @cached_property
    def key(self) -> str:
        """The plan's checksum, by which buffers name it: 16 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def of_file(self, number: int) -> list[tuple[int, Item]]:
        """The items of one file with their places in ``items``, by offset."""
        return [(index, item) for index, item in enumerate(self.items) if item.file == number]


@lru_cache(maxsize=64)
def _read(text: str) -> Plan:
    raw: dict[str, Any] = json.loads(text)
    return Plan(
        rank=raw["rank"],
        world_size=raw["world_size"],
        layout=raw["layout"],
        files=tuple(PlannedFile(**file) for file in raw["files"]),
        items=tuple(
            Item(**{**item, "shape": tuple(item["shape"]), "start": tuple(item["start"])}) for item in raw["items"]
        ),
        size=raw["size"],
        metadata=raw["metadata"],
    )


@dataclass(frozen=True, slots=True)
class Archive:
    """How long a saved piece is, and where in it the numbers begin."""

    length: int
    data: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Packed:
    """Where a piece went: its number on its rank, the file and the offset within the buffer."""

    piece: int
    file: int
    offset: int


def spread(pieces: Sequence[Sequence[tuple[Any, int]]]) -> list[list[int]]:
    """Which rank writes which piece. ``pieces`` has, by rank, (identity, bytes) of what it holds; the result, by rank,
    the numbers of those that it writes.

    What one rank has it writes; what several have goes, the large ones first, to the one of them that writes least.
    """
    holders: dict[Any, list[tuple[int, int]]] = {}
    sizes: dict[Any, int] = {}
    for rank, held in enumerate(pieces):
        for number, (identity, size) in enumerate(held):
            holders.setdefault(identity, []).append((rank, number))
            sizes[identity] = size
    load = [0] * len(pieces)
    chosen: list[list[int]] = [[] for _ in pieces]
    shared = []
    for identity, places in holders.items():
        if len(places) > 1:
            shared.append(identity)
            continue
        rank, number = places[0]
        chosen[rank].append(number)
        load[rank] += sizes[identity]
    shared.sort(key=lambda identity: -sizes[identity])  # stable: the order of the first rank decides among equals
    for identity in shared:
        rank, number = min(holders[identity], key=lambda place: load[place[0]])
        chosen[rank].append(number)
        load[rank] += sizes[identity]
    return [sorted(numbers) for numbers in chosen]


def pack(
    rank: int, numbers: Sequence[int], archives: Sequence[Archive], file_bytes: int = FILE_BYTES
) -> tuple[tuple[PlannedFile, ...], tuple[Packed, ...]]:
    """The files of a rank that writes the pieces ``numbers``, and where each of them lies."""
    files: list[PlannedFile] = []
    places: list[Packed] = []
    begin = end = 0
    for number in numbers:
        places.append(Packed(number, len(files), offset := aligned(end)))
        end = offset + archives[number].length
        if end - begin >= file_bytes:
            files.append(PlannedFile(f"__{rank}_{len(files)}.distcp", begin, end - begin))
            begin = end = aligned(end)
    if end > begin:
        files.append(PlannedFile(f"__{rank}_{len(files)}.distcp", begin, end - begin))
    return tuple(files), tuple(places)


def aligned(offset: int) -> int:
    """The next place where something may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
