"""Reading back: what stands in for a store that keeps no checksum of its objects."""

from __future__ import annotations

from lockstep_trainer.storage.checksum import EMPTY, crc64nvme
from lockstep_trainer.storage.store import ObjectStore

_PIECE = 32 << 20  # bytes in memory at once


def checksum_of(store: ObjectStore, key: str, size: int) -> str:
    """The CRC64NVME of an object, from all its bytes; that of fewer where it is shorter. Raises NotFound."""
    memory = memoryview(bytearray(min(size, _PIECE)))
    checksum, position = EMPTY, 0
    while position < size:
        count = store.get_into(key, position, memory[: size - position])
        if not count:
            break
        checksum = crc64nvme(memory[:count], checksum)
        position += count
    return checksum


def holds(store: ObjectStore, key: str, size: int, crc64nvme: str, *, trust: bool) -> bool:
    """Whether the object is these bytes: by the store's own checksum where there is ``trust`` in it, or by reading it.

    Raises NotFound.
    """
    head = store.head(key)
    if head.size != size:
        return False
    own = head.crc64nvme if trust else None
    return (own or checksum_of(store, key, size)) == crc64nvme
