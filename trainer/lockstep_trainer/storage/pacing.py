"""Uploads at a bounded rate, and bodies of requests that keep to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lockstep_trainer.storage.store import Buffer, view_of

_CHUNK = 256 * 1024  # bytes handed to the connection at once: a bound on how uneven the rate is


class Bandwidth:
    """A rate that all uploads of this process share.

    Whoever wants to send takes its place on one line of time, which moves on by what it will send; it waits for its
    place outside the lock. What was not used is not saved up: after a pause the rate is no higher.
    """

    def __init__(
        self,
        bytes_per_second: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = bytes_per_second, clock, sleep
        self._lock = threading.Lock()
        self._free_at = clock()

    def take(self, size: int) -> None:
        """Return when ``size`` bytes may be sent."""
        with self._lock:
            now = self._clock()
            begins = max(self._free_at, now)
            self._free_at = begins + size / self._rate
        if begins > now:
            self._sleep(begins - now)


class Body:
    """A part of memory as the body of a request: read in place, at the rate, again from its start where it is resent.

    ``read`` hands out more than is asked for: urllib3 asks for 16 KiB, and sending that takes longer than copying it.
    """

    def __init__(self, data: Buffer, bandwidth: Bandwidth | None = None) -> None:
        self._data = view_of(data)
        self._bandwidth = bandwidth
        self._position = 0

    def __len__(self) -> int:
        return len(self._data)

    def tell(self) -> int:
        """Bytes read so far."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        self._position = offset + (0, self._position, len(self._data))[whence]
        return self._position

    def read(self, size: int = -1) -> memoryview:
        """The next bytes, all of them where ``size`` is negative; none at the end."""
        end = len(self._data) if size < 0 else min(len(self._data), self._position + max(size, _CHUNK))
        piece = self._data[self._position : end]
        if self._bandwidth is not None and piece:
            self._bandwidth.take(len(piece))
        self._position += len(piece)
        return piece


_shared: dict[int, Bandwidth] = {}
_shared_lock = threading.Lock()


def shared(bytes_per_second: int | None) -> Bandwidth | None:
    """The process's bandwidth of this rate; None where there is no bound."""
    if bytes_per_second is None:
        return None
    with _shared_lock:
        if bytes_per_second not in _shared:
            _shared[bytes_per_second] = Bandwidth(bytes_per_second)
        return _shared[bytes_per_second]
