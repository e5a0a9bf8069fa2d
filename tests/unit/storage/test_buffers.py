"""Large objects: in parts, verified by the store, repeatable, and nothing left behind where one fails."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep_trainer.errors import Corrupt, NotFound, StoreError
from lockstep_trainer.storage import ObjectStore, open_store, s3parts
from lockstep_trainer.storage.checksum import crc64nvme
from lockstep_trainer.storage.probe import probe
from lockstep_trainer.storage.verify import checksum_of

LARGE = 2 * s3parts.PART + 12_345
DATA = random.Random(1).randbytes(LARGE)
CHECKSUM = crc64nvme(DATA)


@pytest.mark.parametrize("size", [0, 1, 70_000, s3parts.PART, LARGE])
def test_memory_of_any_size_comes_back_as_it_was(store: ObjectStore, size: int) -> None:
    piece = memoryview(DATA)[:size]
    store.put_buffer("step/data", piece, crc64nvme=crc64nvme(piece))
    assert store.head("step/data").size == size
    memory = memoryview(bytearray(size + 3))
    assert store.get_into("step/data", 0, memory) == size
    assert memory[:size] == piece
    assert bytes(memory[size:]) == bytes(3)
    assert [entry.key for entry in store.list()] == ["step/data"]
    assert store.unfinished() == ()


def test_a_part_of_an_object_is_read_from_its_offset_on(store: ObjectStore) -> None:
    store.put_buffer("data", DATA, crc64nvme=CHECKSUM)
    memory = memoryview(bytearray(s3parts.PART + 100))
    assert store.get_into("data", 1000, memory) == len(memory)
    assert memory == DATA[1000 : 1000 + len(memory)]
    assert store.get_into("data", LARGE - 5, memory) == 5
    assert memory[:5] == DATA[-5:]
    assert store.get_into("data", LARGE + 5, memory) == 0
    assert store.get_into("data", 0, memory[:0]) == 0
    for missing in (lambda: store.get_into("none", 0, memory), lambda: store.head("none")):
        with pytest.raises(NotFound):
            missing()
    assert checksum_of(store, "data", LARGE) == CHECKSUM
    assert checksum_of(store, "data", LARGE + 1) == CHECKSUM


def test_a_part_is_read_into_pieces_of_memory_one_behind_the_other(store: ObjectStore) -> None:
    store.put_buffer("data", DATA, crc64nvme=CHECKSUM)
    sizes = (10, 0, s3parts.PART, 700, s3parts.PART, 30_000)
    pieces = [memoryview(bytearray(size)) for size in sizes]
    assert store.get_into("data", 100, *pieces) == LARGE - 100, "the object ends before the memory does"
    assert b"".join(pieces)[: LARGE - 100] == DATA[100:]
    assert not any(b"".join(pieces)[LARGE - 100 :])
    assert store.get_into("data", LARGE, *pieces) == 0


@pytest.mark.parametrize("size", [1000, LARGE])
def test_the_same_content_again_is_success_another_an_error(store: ObjectStore, size: int) -> None:
    piece = DATA[:size]
    checksum = crc64nvme(piece)
    for _ in range(2):
        store.put_buffer("data", piece, crc64nvme=checksum)
    for other in (piece[:-1], piece[:-1] + bytes([piece[-1] ^ 1])):
        with pytest.raises(StoreError, match="other content"):
            store.put_buffer("data", other, crc64nvme=crc64nvme(other))
    assert checksum_of(store, "data", size) == checksum
    assert store.unfinished() == ()
    other = piece[::-1]
    store.put_buffer("data", other, crc64nvme=crc64nvme(other), only_if_absent=False)
    assert checksum_of(store, "data", size) == crc64nvme(other)


def test_what_put_has_stored_is_known_again(store: ObjectStore) -> None:
    """Its checksum is another one: the bytes are read."""
    store.put("data", DATA[:1000])
    store.put_buffer("data", DATA[:1000], crc64nvme=crc64nvme(DATA[:1000]))
    with pytest.raises(StoreError, match="other content"):
        store.put_buffer("data", DATA[1:1001], crc64nvme=crc64nvme(DATA[1:1001]))


@pytest.mark.parametrize("size", [1000, LARGE])
def test_memory_that_is_not_what_its_checksum_says_is_not_stored(store: ObjectStore, size: int) -> None:
    with pytest.raises(Corrupt, match="bytes in memory"):
        store.put_buffer("step/data", DATA[:size], crc64nvme="0123456789abcdef")
    assert store.list() == ()
    assert store.unfinished() == ()


def test_the_memory_is_let_go_of(store: ObjectStore) -> None:
    """A mapped file can't be closed, and its buffer not taken for the next snapshot, while someone holds a view."""
    with mmap.mmap(-1, LARGE) as source, mmap.mmap(-1, LARGE) as target:
        source[:] = DATA
        with memoryview(source) as view:
            store.put_buffer("data", view, crc64nvme=CHECKSUM)
        with memoryview(target) as view:
            assert store.get_into("data", 0, view) == LARGE
        assert target[:] == DATA  # leaving raises BufferError where a view is left


def test_the_probe_has_nothing_to_say_of_a_store_that_verifies(store: ObjectStore) -> None:
    assert probe(store) == ()


def test_what_a_killed_writer_leaves_in_a_folder_is_found_and_removed(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    store.put("step-1/kept", b"1")
    for name in ("step-1/.put-a", "step-2/.put-b"):
        (tmp_path / "store" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "store" / name).write_bytes(b"half")
    assert [upload.key for upload in store.unfinished()] == ["step-1/.put-a", "step-2/.put-b"]
    (upload,) = store.unfinished("step-2/")
    for _ in range(2):
        store.abort(upload)
    assert not (tmp_path / "store/step-2").exists()
    (other,) = store.unfinished()
    store.abort(other)
    assert [entry.key for entry in store.list()] == ["step-1/kept"]
    assert store.unfinished() == ()


def test_in_a_folder_only_uploads_are_aborted(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    store.put("data", b"1")
    (tmp_path / ".put-a").write_bytes(b"")
    (upload,) = store.unfinished()
    wrong: Callable[[], None] = lambda: store.abort(type(upload)("data", "data", 0.0))  # noqa: E731
    with pytest.raises(StoreError, match="is no upload"):
        wrong()
    assert store.get("data")[0] == b"1"


def test_latest_in_a_folder_has_a_head_and_takes_no_buffer(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    with pytest.raises(NotFound):
        store.head("latest")
    first = store.put("latest", b"1", only_if_absent=True)
    store.put("latest", b"22", if_match=first)
    assert store.head("latest").size == 2
    with pytest.raises(StoreError, match="use put"):
        store.put_buffer("latest", b"3", crc64nvme=crc64nvme(b"3"))
