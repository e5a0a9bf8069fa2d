"""Lets the host reach the cluster: listens on the host's loopback, dials inside the control plane's namespace.

A socket stays in the namespace in which it was made. So the listening sockets are made first, then this process moves
into the other namespace and makes the outgoing ones there.

    python forwarder.py NAMESPACE PORT=ADDRESS:PORT…
"""

import asyncio
import contextlib
import ctypes
import os
import socket
import sys

_CLONE_NEWNET = 0x40000000
_CHUNK = 1 << 18


def listen(port: int) -> socket.socket:
    """A listening socket on the loopback of the namespace that this process is in."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(256)
    listener.setblocking(False)
    return listener


def enter(namespace: str) -> None:
    """Move this process into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Copy one direction until its end, then say so to the other side; after an error end both directions."""
    loop = asyncio.get_running_loop()
    buffer = bytearray(_CHUNK)
    try:
        with memoryview(buffer) as view:
            while count := await loop.sock_recv_into(source, buffer):
                await loop.sock_sendall(target, view[:count])
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


async def _join(inside: tuple[str, int], client: socket.socket) -> None:
    with client, socket.socket() as server:
        for one in (client, server):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(server, inside), timeout=10)
        except OSError:  # nobody listens: the client's connection is closed
            return
        await asyncio.gather(_pump(client, server), _pump(server, client))


async def serve(routes: list[tuple[socket.socket, tuple[str, int]]]) -> None:
    """Accept on every listener until killed."""
    loop, joins = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def accept(listener: socket.socket, inside: tuple[str, int]) -> None:
        while True:
            client, _ = await loop.sock_accept(listener)
            task = loop.create_task(_join(inside, client))
            joins.add(task)
            task.add_done_callback(joins.discard)

    await asyncio.gather(*(accept(*route) for route in routes))


def main(namespace: str, *routes: str) -> None:
    """Listen, move, serve."""
    listeners = []
    for route in routes:
        port, _, inside = route.partition("=")
        host, _, inside_port = inside.partition(":")
        listeners.append((listen(int(port)), (host, int(inside_port))))
    enter(namespace)
    asyncio.run(serve(listeners))


if __name__ == "__main__":
    main(*sys.argv[1:])
