"""Who reads which bytes of a checkpoint, and who passes what on to whom: decided from what every rank wants.

A checkpoint is read at another layout than it was written at, so what one rank needs of an item (one rank's shard of
one tensor, as written) may be all of it or a few rows, and several ranks may need the same. An item is read whole, by
one of the ranks that need it, since its checksum is over the whole; the others get from the reader the boxes that they
need and nothing else. So no byte is read twice in a job, and none is read where nobody needs it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""A part of an item's tensor: first index and length in each dimension."""
Want = tuple[int, Box]
"""The number of an item, and what is needed of it."""

WINDOW = 256 * 1024**2
"""Bytes of host memory that a restore may take on each rank, beside the state itself."""
_READ_BYTES = 32 * 1024**2
_READS = 4  # at least for each rank, where they can be: fewer can't be spread evenly
_SMALL_BYTES = 1024**2
"""A request costs some milliseconds, as much as this many bytes: a read may hold as many of which its reader needs
nothing, or which others need as well."""
_GAP_BYTES = 64 * 1024
"""Between items that are read together: what aligns them, or what nobody needs and is not worth a request."""
_ALIGNMENT = 16  # bytes, of each box in a parcel: no dtype is wider


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor shard as it was written."""

    file: str
    offset: int  # bytes
    length: int  # bytes of the archive
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parcel:
    """What some ranks need of a read, all of them the same: the boxes one after the other."""

    route: tuple[int, ...]  # the reader, then those who need it
    wants: tuple[Want, ...]
    places: tuple[tuple[int, int], ...]  # bytes before each box, and its own
    size: int  # bytes

    def children(self, rank: int) -> tuple[int, ...]:
        """To whom ``rank`` passes it on: a tree, so that nobody sends it more than twice."""
        at = self.route.index(rank)
        return self.route[2 * at + 1 : 2 * at + 3]

    def source(self, rank: int) -> int:
        """From whom ``rank``, not the reader, gets it."""
        return self.route[(self.route.index(rank) - 1) // 2]


@dataclass(frozen=True, slots=True)
class Read:
    """One request to the store."""

    reader: int
    file: str
    offset: int  # bytes
    length: int  # bytes
    items: tuple[int, ...]  # by offset
    parcels: tuple[Parcel, ...] = ()


Round = tuple[Read, ...]


def plan(
    items: Mapping[int, Item], wants: Sequence[Sequence[Want]], hosts: Sequence[str], *, window: int = WINDOW
) -> tuple[Round, ...]:
    """The reads of a job, in rounds. ``items``: all that are wanted, by number; ``wants`` and ``hosts``: by rank.

    In each round no rank reads more than a quarter of ``window``, and none packs or receives more than half of it,
    unless it is a single item that is larger.
    """
    needed: defaultdict[int, set[int]] = defaultdict(set)
    by_item: list[defaultdict[int, list[Want]]] = [defaultdict(list) for _ in wants]
    for rank, own in enumerate(wants):
        for want in sorted(own):
            needed[want[0]].add(rank)
            by_item[rank][want[0]].append(want)
    share = sum(items[number].length for number in needed) // (_READS * len(wants))
    limit = min(max(share, _SMALL_BYTES), _READ_BYTES, window // 4)
    groups = list(_grouped(items, needed, limit))
    reads = []
    for group, reader in zip(groups, _readers(items, groups, hosts), strict=True):
        first, last = items[group.items[0]], items[group.items[-1]]
        others = sorted({rank for number in group.items for rank in needed[number]} - {reader})
        boxes = {rank: [want for number in group.items for want in by_item[rank][number]] for rank in others}
        length = last.offset + last.length - first.offset
        reads.append(Read(reader, first.file, first.offset, length, group.items, _parcels(items, boxes, reader)))
    return tuple(_rounds(_in_turn(reads), window))


def _grouped(items: Mapping[int, Item], needed: Mapping[int, set[int]], limit: int) -> Iterator[_Group]:
    """Neighbours in one file that are read together."""
    group: list[int] = []
    begin = end = 0
    by_need: Counter[frozenset[int]] = Counter()  # bytes
    for number in sorted(needed, key=lambda number: (items[number].file, items[number].offset)):
        item, need = items[number], frozenset(needed[number])
        if group:
            apart = item.file != items[group[-1]].file or item.offset - end > _GAP_BYTES
            full = item.offset + item.length - begin > limit
            most = max(by_need[each] + item.length * (each == need) for each in (*by_need, need))
            if apart or full or by_need.total() + item.length - most > _SMALL_BYTES:
                yield _Group(tuple(group), by_need.most_common(1)[0][0])
                group = []
        if not group:
            begin = item.offset
            by_need.clear()
        group.append(number)
        by_need[need] += item.length
        end = item.offset + item.length
    if group:
        yield _Group(tuple(group), by_need.most_common(1)[0][0])


@dataclass(frozen=True, slots=True)
class _Group:
    """Items that are read together."""

    items: tuple[int, ...]  # by offset
    ranks: frozenset[int]  # that need most of it


def _readers(items: Mapping[int, Item], groups: Sequence[_Group], hosts: Sequence[str]) -> list[int]:
    """The reader of each group: of those who need most of it the one whose host, and who itself, has the least to
    read."""
    sizes = [sum(items[number].length for number in group.items) for group in groups]
    readers = [0] * len(groups)
    by_host: Counter[str] = Counter()
    by_rank: Counter[int] = Counter()
    # What leaves least choice comes first, and then the largest: the small ones fill up what they leave uneven.
    for at in sorted(range(len(groups)), key=lambda at: (len(groups[at].ranks), -sizes[at], at)):
        reader = min(groups[at].ranks, key=lambda rank: (by_host[hosts[rank]], by_rank[rank], rank))
        readers[at] = reader
        by_host[hosts[reader]] += sizes[at]
        by_rank[reader] += sizes[at]
    return readers


def _parcels(items: Mapping[int, Item], wants: Mapping[int, list[Want]], reader: int) -> tuple[Parcel, ...]:
    alike: defaultdict[tuple[Want, ...], list[int]] = defaultdict(list)
    for rank, own in wants.items():
        alike[tuple(own)].append(rank)
    parcels = []
    for boxes, ranks in alike.items():
        places: list[tuple[int, int]] = []
        end = 0
        for number, (_, lengths) in boxes:
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            places.append((begin, math.prod(lengths) * items[number].dtype.itemsize))
            end = sum(places[-1])
        parcels.append(Parcel((reader, *ranks), boxes, tuple(places), end))
    return tuple(parcels)


def _in_turn(reads: Iterable[Read]) -> list[Read]:
    """Ordered so that all readers are at work from the first to the last round."""
    before: Counter[int] = Counter()
    keys = []
    for read in reads:
        keys.append((before[read.reader], read.reader, read))
        before[read.reader] += read.length
    return [read for _, _, read in sorted(keys, key=lambda key: key[:2])]


def _rounds(reads: Iterable[Read], window: int) -> Iterator[Round]:
    found: list[Read] = []
    read_bytes: Counter[int] = Counter()
    passed: Counter[int] = Counter()
    for read in reads:
        sent = {read.reader: sum(parcel.size for parcel in read.parcels)}
        sent.update({rank: parcel.size for parcel in read.parcels for rank in parcel.route[1:]})
        full = read_bytes[read.reader] + read.length > window // 4 or any(
            size and passed[rank] + size > window // 2 for rank, size in sent.items()
        )
        if full and found:
            yield tuple(found)
            found = []
            read_bytes.clear()
            passed.clear()
        found.append(read)
        read_bytes[read.reader] += read.length
        passed.update(sent)
    if found:
        yield tuple(found)
