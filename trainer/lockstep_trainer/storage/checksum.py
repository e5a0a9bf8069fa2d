"""CRC64NVME, the checksum of all checkpoint data: what S3 itself verifies end to end.

A checksum is written as 16 hexadecimal digits. Those of adjacent pieces combine into that of the whole without reading
a byte again, so pieces may be made, sent and verified in any order. The work runs without Python's lock.

awscrt is imported at first use: a process that checks nothing should not wait for it.
"""

from __future__ import annotations

import base64

EMPTY = "0" * 16
"""The checksum of no bytes, and where an incremental one begins."""


def crc64nvme(data: bytes | bytearray | memoryview, previous: str = EMPTY) -> str:
    """The checksum of ``data``; with ``previous`` that of the bytes before and ``data`` behind them.

    Raises BufferError where ``data`` is not contiguous.
    """
    from awscrt import checksums

    return f"{checksums.crc64nvme(data, int(previous, 16)):016x}"


def combine(a: str, b: str, length_b: int) -> str:
    """The checksum of two adjacent pieces, from theirs; ``length_b``: bytes of the second."""
    from awscrt import checksums

    return f"{checksums.combine_crc64nvme(int(a, 16), int(b, 16), length_b):016x}"


def to_header(checksum: str) -> str:
    """The checksum as S3 writes it: its 8 bytes in base64."""
    return base64.b64encode(bytes.fromhex(checksum)).decode()


def from_header(value: str) -> str:
    """The checksum that S3 wrote; raises ValueError where it is none."""
    checksum = base64.b64decode(value, validate=True).hex()
    if len(checksum) != len(EMPTY):
        raise ValueError(f"{value!r} is no CRC64NVME of a whole object")
    return checksum
