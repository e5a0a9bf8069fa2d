"""The agent's standard output, which is the container's log: whoever reads it may be slow, or stand still.

A thread writes, so that nobody waits for it. It writes to the descriptor and not to ``sys.stdout``, whose lock a write
that never ends would keep from the interpreter's own end.
"""

from __future__ import annotations

import asyncio
import os
import threading
from queue import SimpleQueue

_POLL_SECONDS = 0.01


class ContainerLog:
    """What is given is written in this order."""

    def __init__(self, descriptor: int = 1) -> None:
        self._descriptor = descriptor
        self._queue: SimpleQueue[bytes] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given = 0
        self.written = 0
        """Bytes, since the agent began. What nobody can read any more counts, too."""

    def give(self, data: bytes) -> int:
        """Have it written; returns what ``written`` will be then."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="container log", daemon=True)
            self._thread.start()
        self._given += len(data)
        self._queue.put(data)
        return self._given

    async def flush(self, seconds: float) -> None:
        """Until all is written, at most so long."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.written < self._given and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)

    def _write(self) -> None:
        while True:
            rest = memoryview(self._queue.get())
            while rest:
                try:
                    count = os.write(self._descriptor, rest)
                except OSError:  # nobody reads it any more
                    count = len(rest)
                rest = rest[count:]
                self.written += count


STDOUT = ContainerLog()
