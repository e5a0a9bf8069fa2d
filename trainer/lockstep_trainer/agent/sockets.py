"""Connections that notice by themselves that the other side is gone.

A node without power closes nothing. Who waits for its next bytes waits for ever then, who has sent it some for a
quarter of an hour (tcp(7), tcp_retries2), and each such connection holds a descriptor, its buffers and what it was to
bring.
"""

from __future__ import annotations

import socket
from typing import Any

IDLE_SECONDS = 15
"""After so long without a byte the other side is asked whether it is there, …"""
ASK_SECONDS = 5
"""… so often …"""
ASK_TIMES = 3
"""… and so many times."""
UNANSWERED_SECONDS = 30
"""What was sent and not acknowledged for so long will not be. Longer than any bound for a member's silence."""


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


def outgoing(address: tuple[Any, ...]) -> socket.socket:
    """A socket to connect with, for aiohttp; ``address`` as of ``getaddrinfo``."""
    family, kind, protocol, *_ = address
    return watched(socket.socket(family, kind, protocol))
