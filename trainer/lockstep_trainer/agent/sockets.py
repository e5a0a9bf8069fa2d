"""Connections that notice by themselves that the other side is gone.

A node without power closes nothing. Who waits for its next bytes waits for ever then, who has sent it some for a
quarter of an hour (tcp(7), tcp_retries2), and each such connection holds a descriptor, its buffers and what it was to
bring.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

IDLE_SECONDS = 15
"""After so long without a byte the other side is asked whether it is there, …"""
ASK_SECONDS = 5
"""… so often …"""
ASK_TIMES = 3
"""… and so many times."""
UNANSWERED_SECONDS = 30
"""What was sent and not acknowledged for so long will not be. Longer than any bound for a member's silence."""

ANSWER_SECONDS = 3.0
"""A host that is there answers a call within this time, however much its processes have to do."""


def watched(connection: socket.socket) -> socket.socket:
    """Set the bounds, as far as the system has them. What a listening socket accepts has its bounds, too."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    bounds = {
        "TCP_KEEPIDLE": IDLE_SECONDS,
        "TCP_KEEPINTVL": ASK_SECONDS,
        "TCP_KEEPCNT": ASK_TIMES,
        "TCP_USER_TIMEOUT": 1000 * UNANSWERED_SECONDS,
    }
    for name, bound in bounds.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, bound)
    return connection


@dataclass(frozen=True)
class Call:
    """A connection that is being made."""

    made: list[socket.socket] = field(default_factory=list)

    @property
    def answered(self) -> bool:
        """Whether the other host has; its process may not have come to it yet."""
        return any(_is_connected(connection) for connection in self.made)


_CALL: ContextVar[Call | None] = ContextVar("_CALL", default=None)


@asynccontextmanager
async def calling(seconds: float) -> AsyncIterator[Call]:
    """Bounds what is asked for within, by aiohttp and ``outgoing``: raises TimeoutError behind ``seconds``, and behind
    ANSWER_SECONDS where no new connection was answered until then.

    aiohttp's own bound for connecting, ``sock_connect``, would count the handshake of TLS, too. A process that is
    called by thousands at once comes to each of them late, and the later the more often they begin again.
    """
    call, loop = Call(), asyncio.get_running_loop()
    before = _CALL.set(call)
    try:
        async with asyncio.timeout(seconds) as bound:

            def look() -> None:
                if not call.answered:
                    bound.reschedule(loop.time())

            looking = loop.call_later(ANSWER_SECONDS, look)
            try:
                yield call
            finally:
                looking.cancel()
    finally:
        _CALL.reset(before)


def outgoing(address: tuple[Any, ...]) -> socket.socket:
    """A socket to connect with, for aiohttp; ``address`` as of ``getaddrinfo``."""
    family, kind, protocol, *_ = address
    connection = watched(socket.socket(family, kind, protocol))
    if call := _CALL.get():
        call.made.append(connection)
    return connection


def _is_connected(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True
