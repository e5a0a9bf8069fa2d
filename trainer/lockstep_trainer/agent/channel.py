"""A WebSocket that is written to without waiting: what can't be sent in time closes it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from aiohttp import ClientWebSocketResponse
from aiohttp.web import WebSocketResponse

from lockstep_api.messages import Message
from lockstep_api.wire import encode

_QUEUE = 4096  # messages; a peer that is so far behind is as good as gone
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Listings of large jobs are megabytes of JSON."""


class Channel:
    """The sending half of a stream, in order."""

    def __init__(self, socket: WebSocketResponse | ClientWebSocketResponse) -> None:
        self._socket = socket
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue(_QUEUE)
        self._task = asyncio.create_task(self._write())

    def send(self, message: Message) -> None:
        """Queue a message; lost where the stream breaks."""
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self.close()

    def close(self) -> None:
        """Close the stream; what is still queued is lost."""
        self._task.cancel()
        task = asyncio.ensure_future(self._socket.close())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def flush(self) -> None:
        """Send what is queued, then close."""
        await self._queue.put(None)
        with suppress(asyncio.CancelledError):
            await self._task
        self.close()

    def end(self) -> None:
        """The stream has ended on its own."""
        self._task.cancel()

    async def _write(self) -> None:
        with suppress(ConnectionError):
            while (message := await self._queue.get()) is not None:
                await self._socket.send_str(encode(message))
