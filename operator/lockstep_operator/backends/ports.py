"""Ports of this machine for servers that start in a moment."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

PORTS = range(12_000, 20_000)
"""Below what Linux takes for outgoing connections and what Kubernetes takes for NodePorts."""


def reserve(count: int, host: str = "127.0.0.1") -> list[socket.socket]:
    """Ports that nobody has, and which nobody else gets from here while these sockets are open: in this process or
    another. A server takes one for its own if it sets SO_REUSEADDR, as nearly all do. Raises OSError where too few are
    free.

    Linux lets two sockets have one port if both say SO_REUSEADDR and neither listens yet. So a reservation says so, but
    only once it has its port: asking for one it conflicts with every other.
    """
    found: list[socket.socket] = []
    for port in random.sample(PORTS, len(PORTS)):
        one = socket.socket()
        with suppress(OSError):
            one.bind((host, port))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.append(one)
            if len(found) == count:
                return found
            continue
        one.close()
    release(found)
    raise OSError(f"of the ports {PORTS.start} to {PORTS.stop - 1} on {host} fewer than {count} are free")


def number(reserved: socket.socket) -> int:
    """Its port."""
    return int(reserved.getsockname()[1])


def release(reserved: list[socket.socket]) -> None:
    """Others may have them again."""
    for one in reserved:
        one.close()
