"""The agent's standard output and error, which are the container's log: whoever reads it may be slow, or stand still.

A thread writes to each, so that nobody waits for it. It writes to the descriptor and not to ``sys.stdout``, whose lock
a write that never ends would keep from the interpreter's own end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from queue import SimpleQueue

FLUSH_SECONDS = 2.0
"""How long the container's log may take for the last lines."""
_POLL_SECONDS = 0.01
_UNWRITTEN_BYTES = 1024 * 1024


class ContainerLog:
    """What is given is written in this order."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._queue: SimpleQueue[bytes] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given = 0
        self.written = 0
        """Bytes, since the agent began. What nobody can read any more counts, too."""

    @property
    def unwritten(self) -> int:
        """Bytes that wait."""
        return self._given - self.written

    def give(self, data: bytes) -> int:
        """Have it written; returns what ``written`` will be then."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="container log", daemon=True)
            self._thread.start()
        self._given += len(data)
        self._queue.put(data)
        return self._given

    async def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Until all is written, at most so long."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.unwritten and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)

    def settle(self, seconds: float = FLUSH_SECONDS) -> None:
        """The same where nothing else is to run any more."""
        deadline = time.monotonic() + seconds
        while self.unwritten and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

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


class Records(logging.Handler):
    """The agent's own log records. While more than 1 MiB of them waits to be written they are left out, and counted."""

    def __init__(self, log: ContainerLog) -> None:
        super().__init__()
        self._log = log
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Have it written; called under the handler's lock."""
        try:
            line = self.format(record)
        except Exception:  # of whoever calls the log
            self.handleError(record)
            return
        if self._log.unwritten > _UNWRITTEN_BYTES:
            self._left_out += 1
            return
        if self._left_out:
            line = f"{self._left_out} lines of the agent are left out here: nobody has read its log\n{line}"
            self._left_out = 0
        self._log.give(f"{line}\n".encode(errors="replace"))


STDOUT, STDERR = ContainerLog(1), ContainerLog(2)
