"""CRC64NVME: the published check value, and that pieces combine into the whole."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep_trainer.storage.checksum import EMPTY, combine, crc64nvme, from_header, to_header


def test_it_is_the_published_checksum() -> None:
    """The check value of CRC-64/NVME in the catalogue of CRC algorithms."""
    assert crc64nvme(b"123456789") == "ae8b14860a799888"
    assert crc64nvme(b"") == EMPTY


@given(pieces=st.lists(st.binary(max_size=200), max_size=6))
def test_pieces_combine_into_the_whole(pieces: list[bytes]) -> None:
    whole = running = EMPTY
    for piece in pieces:
        running = crc64nvme(piece, running)
        whole = combine(whole, crc64nvme(memoryview(piece)), len(piece))
    assert whole == running == crc64nvme(b"".join(pieces))


def test_mapped_memory_is_read_in_place() -> None:
    with mmap.mmap(-1, 5000) as memory:
        memory[1000:1009] = b"123456789"
        assert crc64nvme(memoryview(memory)[1000:1009]) == "ae8b14860a799888"


def test_the_form_of_the_header_is_s3s() -> None:
    """As S3 answers for an object of these bytes (base64 of the eight bytes, highest first)."""
    assert to_header("ae8b14860a799888") == "rosUhgp5mIg="
    assert from_header("rosUhgp5mIg=") == "ae8b14860a799888"
    for wrong in ("AAAA", "rosUhgp5mIg=-3", ""):
        with pytest.raises(ValueError):  # noqa: PT011 binascii's and ours are both ValueError
            from_header(wrong)
