"""A node that loses its power closes no connection: the other side must notice by itself, or it holds it for ever."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest
from aiohttp import ClientSession, TCPConnector, web

from lockstep_trainer.agent.sockets import IDLE_SECONDS, UNANSWERED_SECONDS, outgoing, watched

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's options")


def bounds(connection: socket.socket) -> tuple[bool, int, int]:
    return (
        bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)),
        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    )


async def both_ends() -> list[tuple[bool, int, int]]:
    """Of one request, as aiohttp has them in use."""
    found = []

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        found.append(bounds(request.transport.get_extra_info("socket")))
        return web.Response(body=bytes(1_000_000))  # so large that the connection is still in use when it is looked at

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    listening = watched(socket.create_server(("127.0.0.1", 0)))
    await web.SockSite(runner, listening).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    async with ClientSession(connector=TCPConnector(socket_factory=outgoing)) as session, session.get(url) as response:
        assert response.connection is not None
        assert response.connection.transport is not None
        found.append(bounds(response.connection.transport.get_extra_info("socket")))
    await runner.cleanup()
    return found


def test_both_ends_of_a_connection_have_bounds() -> None:
    assert asyncio.run(both_ends()) == [(True, IDLE_SECONDS, 1000 * UNANSWERED_SECONDS)] * 2
