"""The plan of a restore: every byte that is needed is read once, by one that needs it, and reaches all who need it."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import pytest
import torch

from lockstep_trainer.checkpoint.fetch import Box, Item, Parcel, Read, Want, plan

KIB, MIB = 1024, 1024**2


def rows(length: int, number: int, count: int, *, first: int = 0) -> list[Want]:
    """A want for each of ``count`` equal parts of ``length`` rows of an item."""
    step = length // count
    return [(number, ((first + part * step,), (step,))) for part in range(count)]


def item(file: str, at: int, elements: int) -> Item:
    return Item(file, at, 4 * elements + 64, torch.float32, (elements,))


def random_job(seed: int) -> tuple[dict[int, Item], list[list[Want]], list[str]]:
    """Files with items of 64 B to 4 MiB; some needed by all, some in parts by a few, some by one, some by nobody."""
    source = random.Random(seed)
    ranks = source.randint(1, 9)
    items: dict[int, Item] = {}
    wants: list[list[Want]] = [[] for _ in range(ranks)]
    number = 0
    for file in range(source.randint(1, 5)):
        at = 0
        for _ in range(source.randint(1, 40)):
            elements = 12 * source.choice([1, 50, 1000, 100_000])
            found = item(f"__{file}_0.distcp", at, elements)
            at += found.length
            number += 1
            kind = source.choice(["all", "parts", "one", "nobody"])
            if kind == "nobody":
                continue
            items[number] = found
            if kind == "all":
                for own in wants:
                    own.append((number, ((0,), (elements,))))
            elif kind == "one":
                wants[source.randrange(ranks)].append((number, ((0,), (elements,))))
            else:
                for want in rows(elements, number, source.choice([2, 3, 4])):
                    wants[source.randrange(ranks)].append(want)
    return items, wants, [f"host{rank // 4}" for rank in range(ranks)]


@pytest.mark.parametrize("seed", range(40))
def test_every_byte_is_read_once_and_reaches_all_who_need_it(seed: int) -> None:
    items, wants, hosts = random_job(seed)
    read_by: dict[int, int] = {}
    got: list[list[Want]] = [[] for _ in wants]
    for read in (read for each in plan(items, wants, hosts) for read in each):
        end = read.offset
        assert items[read.items[0]].offset == end
        for number in read.items:
            assert items[number].file == read.file
            assert 0 <= items[number].offset - end <= 64 * KIB, "little is read that nobody needs"
            end = items[number].offset + items[number].length
            assert number not in read_by
            read_by[number] = read.reader
            got[read.reader] += [want for want in wants[read.reader] if want[0] == number]
        assert end == read.offset + read.length
        needed_here = {want[0] for want in wants[read.reader]}
        assert needed_here & set(read.items), "the reader needs some of it"
        for parcel in read.parcels:
            assert {number for number, _ in parcel.wants} <= set(read.items)
            for rank in delivered(parcel):
                got[rank] += parcel.wants
    assert read_by.keys() == items.keys()
    assert [sorted(own) for own in got] == [sorted(own) for own in wants]


def delivered(parcel: Parcel) -> list[int]:
    """Whom the parcel reaches, each once, from the one that it expects it from."""
    reached, at = [], [parcel.route[0]]
    while at:
        rank = at.pop()
        for child in parcel.children(rank):
            assert parcel.source(child) == rank
            reached.append(child)
            at.append(child)
    assert sorted(reached) == sorted(parcel.route[1:])
    return reached


@pytest.mark.parametrize("window", [MIB, 16 * MIB])
@pytest.mark.parametrize("seed", range(40))
def test_a_round_stays_within_the_window(seed: int, window: int) -> None:
    items, wants, hosts = random_job(seed)
    for each in plan(items, wants, hosts, window=window):
        for rank in range(len(wants)):
            reads = [read for read in each if read.reader == rank]
            # The exception is an item that does not fit, which is then alone.
            assert sum(read.length for read in reads) <= window // 4 or [len(read.items) for read in reads] == [1]
            passed = [sum(sizes) for read in each if (sizes := passing(read, rank))]
            assert sum(passed) <= window // 2 or len(passed) == 1


def passing(read: Read, rank: int) -> list[int]:
    """Bytes of a read's parcels that ``rank`` packs or receives."""
    return [parcel.size for parcel in read.parcels if rank in parcel.route]


def test_boxes_of_a_parcel_do_not_overlap_and_are_aligned() -> None:
    items = {0: item("f", 0, 3), 1: Item("f", 76, 70, torch.bfloat16, (3,)), 2: item("f", 146, 5)}
    whole: list[Want] = [(number, ((0,), each.shape)) for number, each in items.items()]
    ((read,),) = plan(items, [whole, whole, whole], ["a"] * 3)
    (parcel,) = read.parcels
    assert parcel.route == (0, 1, 2)
    assert parcel.places == ((0, 12), (16, 6), (32, 20))
    assert parcel.size == 52


def test_reads_are_spread_by_bytes_over_hosts_and_ranks() -> None:
    """What all need, beside what only one rank of the first host needs: the others read all of the former."""
    own, shared = 6, 18
    items = {number: item("f", number * (4 * MIB + 64), MIB) for number in range(own + shared)}
    wants: list[list[Want]] = [[] for _ in range(4)]
    box: Box = ((0,), (MIB,))
    wants[0] = [(number, box) for number in range(own)]
    for rank in range(4):
        wants[rank] += [(number, box) for number in range(own, own + shared)]
    load: Counter[int] = Counter()
    for read in (read for each in plan(items, wants, ["a", "a", "b", "b"]) for read in each):
        load[read.reader] += len(read.items)
    assert load == {0: 6, 1: 6, 2: 6, 3: 6}


def test_readers_are_at_work_in_every_round() -> None:
    """The ranks' reads are taken in turn, so that all of them read and all of them send at the same time."""
    items = {number: item(f"__{number // 8}_0.distcp", number % 8 * (4 * MIB + 64), MIB) for number in range(32)}
    wants = [[(number, ((0,), (MIB,))) for number in range(32) if number // 8 == rank] for rank in range(4)]
    rounds = plan(items, wants, list("abcd"), window=32 * MIB)
    readers = defaultdict(set)
    for at, each in enumerate(rounds):
        for read in each:
            readers[at].add(read.reader)
    assert len(rounds) == 8
    assert all(found == {0, 1, 2, 3} for found in readers.values())


def test_small_neighbours_are_one_request_and_large_ones_are_not() -> None:
    small = {number: item("f", number * 512, 100) for number in range(100)}  # aligned: 48 bytes stand between them
    wants: list[list[Want]] = [
        [(number, ((0,), (100,))) for number in range(100) if number % 2 == rank] for rank in range(2)
    ]
    ((read,),) = plan(small, wants, ["a", "b"])
    assert read.length == 99 * 512 + 464
    large = {number: item("f", number * (4 * MIB + 64), MIB) for number in range(4)}
    whole: list[list[Want]] = [[(n, ((0,), (MIB,))) for n in range(4) if n % 2 == rank] for rank in range(2)]
    reads = [read for each in plan(large, whole, ["a", "b"]) for read in each]
    assert [(read.reader, read.items, read.parcels) for read in reads] == [
        (0, (0,), ()),
        (1, (1,), ()),
        (0, (2,), ()),
        (1, (3,), ()),
    ]


def test_a_few_bytes_that_others_need_do_not_cut_a_read_in_two() -> None:
    """Between a rank's large shards stand small ones that both need: it reads them too, and passes them on."""
    sizes = [MIB // 2, 1, MIB // 2, 1, MIB // 2]
    items, end = {5: item("g", 0, 16 * MIB)}, 0
    for number, size in enumerate(sizes):
        items[number] = item("f", end, size)
        end += items[number].length + 48
    wants: list[list[Want]] = [
        [(number, ((0,), (size,))) for number, size in enumerate(sizes)],
        [*((number, ((0,), (1,))) for number in (1, 3)), (5, ((0,), (16 * MIB,)))],
    ]
    read, _ = sorted((read for each in plan(items, wants, ["a", "b"]) for read in each), key=lambda read: read.file)
    assert (read.reader, read.items) == (0, (0, 1, 2, 3, 4))
    assert [(parcel.route, [number for number, _ in parcel.wants]) for parcel in read.parcels] == [((0, 1), [1, 3])]


def test_a_rank_is_sent_no_more_than_it_needs() -> None:
    """One shard of 16 MiB at a layout of 8: each of the others gets its eighth."""
    elements = 4 * MIB
    wants = [[want] for want in rows(elements, 0, 8)]
    ((read,),) = plan({0: item("f", 0, elements)}, wants, ["a"] * 8)
    assert sorted(parcel.size for parcel in read.parcels) == [2 * MIB] * 7
    assert math.prod(read.parcels[0].wants[0][1][1]) == elements // 8
