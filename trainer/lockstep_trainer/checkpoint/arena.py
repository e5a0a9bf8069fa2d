"""Host memory that is lent, given back and lent again.

A page that nobody has touched yet costs more than what is then read into it: with small pages several times the copy.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

_HUGE_BYTES = 2 << 20
_SMALL_BYTES = 64 << 10


class Arena:
    """At most ``max_bytes``, lent and kept together, or one buffer that is larger. Not for several threads at once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lent = 0  # bytes
        self._free: list[memoryview] = []

    def lend(self, size: int) -> memoryview | None:
        """A buffer of ``size`` bytes or up to twice as many, what stands in it unknown; None where too much is lent."""
        fitting = [buffer for buffer in self._free if size <= len(buffer) <= 2 * size]
        found = min(fitting, key=len, default=None)
        needed = len(found) if found is not None else _rounded(size)
        if self._lent and self._lent + needed > self._max_bytes:
            return None
        if found is not None:
            self._free = [buffer for buffer in self._free if buffer is not found]
        while self._free and self._lent + needed + sum(map(len, self._free)) > self._max_bytes:
            del self._free[0]
        self._lent += needed
        return found if found is not None else _made(needed)

    def give_back(self, buffer: memoryview) -> None:
        """It, as it was lent, is no longer needed."""
        self._lent -= len(buffer)
        self._free.append(buffer)


def _rounded(size: int) -> int:
    for unit in (_HUGE_BYTES, _SMALL_BYTES):
        if size >= unit:
            return -(-size // unit) * unit
    return size


def _made(size: int) -> memoryview:
    if size < _HUGE_BYTES:
        return memoryview(bytearray(size))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
