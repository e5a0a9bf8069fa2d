"""CRC64NVME: the checksum of everything in a step folder.

S3 computes it too and refuses bytes that were damaged on the way; those of parts combine to that of the whole.
"""

from __future__ import annotations

import awscrt.checksums


def crc64nvme(data: bytes | memoryview, previous: str | None = None) -> str:
    """16 hex digits; ``previous`` is the checksum of what stands before ``data``."""
    return f"{awscrt.checksums.crc64nvme(data, int(previous, 16) if previous else 0):016x}"


def combine(first: str, second: str, second_length: int) -> str:
    """The checksum of two pieces one behind the other; ``second_length`` in bytes."""
    return f"{awscrt.checksums.combine_crc64nvme(int(first, 16), int(second, 16), second_length):016x}"
