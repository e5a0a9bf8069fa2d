"""Where a restore's bytes go: memory that is lent again, and tensors that are read in place."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep_trainer.checkpoint.ahead import Ahead
from lockstep_trainer.checkpoint.archive import Alike, is_around
from lockstep_trainer.checkpoint.arena import Arena
from lockstep_trainer.checkpoint.fetch import Box, Item, Read
from lockstep_trainer.checkpoint.homes import homes
from lockstep_trainer.checkpoint.planning import make_frame
from lockstep_trainer.errors import Corrupt
from lockstep_trainer.storage import ObjectStore, open_store
from lockstep_trainer.storage.checksum import crc64nvme

MIB = 1 << 20
SHAPE = (256, 300)
WHOLE: Box = ((0, 0), SHAPE)


def test_memory_that_came_back_is_lent_again() -> None:
    arena = Arena(8 * MIB)
    first, second = arena.lend(3 * MIB), arena.lend(4 * MIB)
    assert first is not None
    assert second is not None
    assert len(first) >= 3 * MIB
    assert arena.lend(MIB) is None, "too much is lent"
    arena.give_back(first)
    assert arena.lend(3 * MIB) is first
    arena.give_back(second)
    small = arena.lend(100)
    assert small is not None
    assert len(small) == 100, "no buffer of megabytes for a few bytes"


def test_what_is_kept_and_lent_stays_within_the_bound() -> None:
    arena = Arena(8 * MIB)
    for size in (6 * MIB, 2 * MIB, 7 * MIB, MIB, 8 * MIB):
        buffer = arena.lend(size)
        assert buffer is not None
        assert arena._lent + sum(map(len, arena._free)) <= 8 * MIB
        arena.give_back(buffer)
    huge = arena.lend(20 * MIB)
    assert huge is not None, "one that is larger than all is lent alone"
    assert arena.lend(1) is None


def written(tensor: Tensor) -> bytes:
    """As a snapshot has it: the frame that was planned with, around the numbers."""
    frame = make_frame(tensor.dtype, tuple(tensor.shape))
    return frame.head + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() + frame.tail


def saved(value: Any) -> bytes:
    """As torch.save writes it to a buffer."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def repacked(data: bytes) -> bytes:
    """The same records as another writer of zip archives has them: not aligned."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return out.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn], ids=str)
def test_a_frame_is_known_for_what_it_is(dtype: torch.dtype) -> None:
    frame = make_frame(dtype, (5, 7))
    size = 35 * dtype.itemsize
    assert is_around(frame.head, size, frame.tail, dtype, (5, 7))
    assert not is_around(frame.head, size, frame.tail, dtype, (7, 5)), "another shape"
    assert not is_around(frame.head, size, frame.tail, torch.float64, (5, 7)), "another dtype"
    assert not is_around(frame.head, size + 1, frame.tail, dtype, (5, 7)), "another length"
    assert not is_around(frame.head[:-1], size + 1, frame.tail, dtype, (5, 7)), "the numbers begin later"
    assert not is_around(b"", size, b"", dtype, (5, 7)), "no archive"


def test_archives_that_look_alike_are_each_read_for_themselves() -> None:
    alike = Alike()
    for number in range(3):
        tensor = torch.arange(6.0).view(2, 3) + number
        data = memoryview(bytearray(written(tensor)))
        assert torch.equal(alike.tensor_in(data, torch.float32, (2, 3), "here"), tensor)
    transposed = torch.arange(6.0).view(3, 2).t()
    frame = saved(transposed)
    for _ in range(2):
        assert torch.equal(alike.tensor_in(memoryview(bytearray(frame)), torch.float32, (2, 3), "here"), transposed)
    other = saved(torch.arange(6).view(2, 3))
    assert alike.tensor_in(memoryview(bytearray(other)), torch.float32, (2, 3), "here").dtype == torch.int64


def run(root: Path, data: bytes, items: Mapping[int, Item], targets: Mapping[int, Any], damaged: int = -1) -> None:
    """One read of all of ``data``, which holds the items; the byte at ``damaged`` is another one in the store."""
    store: ObjectStore = open_store(f"file://{root}")
    there = bytearray(data)
    if damaged >= 0:
        there[damaged] ^= 1
    store.put("folder/file", bytes(there))
    checksums = {n: crc64nvme(data[item.offset : item.offset + item.length]) for n, item in items.items()}
    reads = [Read(0, "file", 0, len(data), tuple(items))]
    with Ahead(store, "folder", reads, items, checksums, targets=targets, max_bytes=MIB) as ahead:
        ahead.take(1)
        ahead.done()


def test_large_tensors_are_read_in_place_whatever_stands_around_them(tmp_path: Path) -> None:
    """Between two that go straight to their places: a small one, and one of which only a part is wanted."""
    tensors = [torch.randn(SHAPE), torch.arange(4.0), torch.randn(SHAPE), torch.randn(SHAPE)]
    data, items = bytearray(), {}
    for number, tensor in enumerate(tensors):
        data += bytes(-len(data) % 64)
        archive = written(tensor)
        items[number] = Item("file", len(data), len(archive), tensor.dtype, tuple(tensor.shape))
        data += archive
    found = [torch.zeros_like(tensor) for tensor in tensors]
    again = torch.zeros(SHAPE)
    part: Box = ((3, 10), (20, 30))
    targets: dict[int, Any] = {
        0: {WHOLE: [found[0], again]},
        1: {((0,), (4,)): [found[1]]},
        2: {part: [found[2][3:23, 10:40]]},
        3: {WHOLE: [found[3]]},
    }
    assert set(homes(items, items, targets)) == {0, 3}
    run(tmp_path, bytes(data), items, targets)
    for number in (0, 1, 3):
        assert torch.equal(found[number], tensors[number])
    assert torch.equal(again, tensors[0])
    assert torch.equal(found[2][3:23, 10:40], tensors[2][3:23, 10:40])
    assert int((found[2] != 0).sum()) == 600


@pytest.mark.parametrize("order", ["another head", "transposed"])
def test_an_archive_that_only_has_the_length_of_a_known_one_is_read_as_what_it_is(tmp_path: Path, order: str) -> None:
    """Its numbers stand elsewhere, or in another order, than where they were read to."""
    right = torch.randn(SHAPE)
    data = repacked(saved(right)) if order == "another head" else saved(right.t().contiguous().t())
    frame = make_frame(right.dtype, SHAPE)
    missing = len(frame.head) + right.nbytes + len(frame.tail) - len(data)
    data = data[:-2] + missing.to_bytes(2, "little") + bytes(missing)  # as the comment that a zip may end with
    items = {0: Item("file", 0, len(data), right.dtype, SHAPE)}
    found = torch.zeros(SHAPE)
    targets = {0: {WHOLE: [found]}}
    (home,) = homes(items, items, targets).values()
    assert not home.fits(memoryview(data)[: home.head], memoryview(data)[-home.tail :])
    run(tmp_path, data, items, targets)
    assert torch.equal(found, right)


@pytest.mark.parametrize("part", ["head", "numbers", "tail"])
def test_a_wrong_byte_around_or_in_a_tensor_that_is_read_in_place_is_corrupt(tmp_path: Path, part: str) -> None:
    data = written(torch.randn(SHAPE))
    items = {0: Item("file", 0, len(data), torch.float32, SHAPE)}
    damaged = {"head": 40, "numbers": len(data) // 2, "tail": len(data) - 40}[part]
    with pytest.raises(Corrupt, match="differ from their checksum"):
        run(tmp_path, data, items, {0: {WHOLE: [torch.zeros(SHAPE)]}}, damaged)
