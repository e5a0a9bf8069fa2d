"""Calls between agents: a leader of thousands comes late to each of them, a host without power never answers."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web

from lockstep_api.messages import Invite
from lockstep_trainer.agent import sockets, streams
from lockstep_trainer.agent.server import Server
from lockstep_trainer.agent.streams import Inviter, LeaderStream
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.protocol import events

UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: leader\r\nAuthorization: Bearer token\r\nConnection: Upgrade\r\n"
    "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    (tmp_path / "token").write_text("token")
    return Trust(tmp_path, "uid", use_tls=False)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host has less time to answer, and does all the same: it is this one."""
    monkeypatch.setattr(sockets, "ANSWER_SECONDS", 0.3)


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that answers no call: its queue is full, so that the kernel passes over new ones."""
    with ExitStack() as open_:
        listening = open_.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = open_.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        time.sleep(0.05)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


class Late:
    """A leader that comes to each of its members only when it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.ready = asyncio.Event()

    async def member(self, request: web.Request) -> web.WebSocketResponse:
        self.calls += 1
        await self.ready.wait()
        stream = web.WebSocketResponse()
        await stream.prepare(request)
        await asyncio.sleep(10)
        return stream


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def stream_to(late: Late, trust: Trust, said: list[events.Event]) -> AsyncIterator[tuple[LeaderStream, str]]:
    app = web.Application()
    app.router.add_get("/v1/member", late.member)
    async with serving(app) as address, streams.session() as session:
        stream = LeaderStream(session, trust, said.append)
        yield stream, address
        stream.close()


async def until(late: Late, calls: int) -> None:
    while late.calls < calls:
        await asyncio.sleep(0.01)


def test_a_leader_with_much_to_do_is_waited_for(trust: Trust) -> None:
    """To begin again would give it more to do; and it invites whoever has not come to it."""

    async def main() -> None:
        late, said = Late(), list[events.Event]()
        async with asyncio.timeout(20), stream_to(late, trust, said) as (stream, address):
            stream.open(address, 1)
            await until(late, 1)
            await asyncio.sleep(3 * sockets.ANSWER_SECONDS)
            stream.open(address, 1)
            late.ready.set()
            while not said:
                await asyncio.sleep(0.01)
            assert said == [events.StreamOpened(1)]
            assert late.calls == 1

    asyncio.run(main())


def test_another_epoch_begins_another_stream(trust: Trust) -> None:
    async def main() -> None:
        late, said = Late(), list[events.Event]()
        async with asyncio.timeout(20), stream_to(late, trust, said) as (stream, address):
            stream.open(address, 1)
            await until(late, 1)
            stream.open(address, 2)
            await until(late, 2)
            late.ready.set()
            while not said:
                await asyncio.sleep(0.01)
            assert said == [events.StreamOpened(2)]

    asyncio.run(main())


def test_a_leader_that_never_comes_to_it_is_called_again(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_OPEN_SECONDS", 0.2)

    async def main() -> None:
        late = Late()
        async with asyncio.timeout(20), stream_to(late, trust, []) as (stream, address):
            stream.open(address, 1)
            await until(late, 3)

    asyncio.run(main())


def test_a_host_that_does_not_answer_is_given_up_soon(nobody: str) -> None:
    async def main() -> None:
        async with streams.session() as session:
            begun = time.monotonic()
            with pytest.raises(TimeoutError):
                async with sockets.calling(60), session.get(f"http://{nobody}/"):
                    pass
            assert time.monotonic() - begun < 10

    asyncio.run(main())


def test_a_host_that_does_not_answer_is_called_anew_when_it_says_that_it_is_there(nobody: str, trust: Trust) -> None:
    """The call that is under way may have been lost."""

    async def main() -> None:
        async with streams.session() as session:
            stream = LeaderStream(session, trust, lambda _: None)
            stream.open(nobody, 1)
            await asyncio.sleep(0.05)
            first = stream._task
            stream.open(nobody, 1)
            assert stream._task is not first
            stream.close()

    asyncio.run(main())


def test_members_that_are_silent_keep_no_other_from_being_invited(trust: Trust) -> None:
    """The kernel of a node answers the call, and nobody there anything more."""

    async def main() -> None:
        invited = asyncio.Event()

        async def invite(_: web.Request) -> web.Response:
            invited.set()
            return web.Response()

        app = web.Application()
        app.router.add_post("/v1/invite", invite)
        async with serving(app) as address, streams.session() as session:
            inviter = Inviter(session, trust, lambda _: None)
            with socket.create_server(("0.0.0.0", 0), backlog=512) as silent:
                port = silent.getsockname()[1]
                for slot in range(150):
                    inviter.post(f"127.0.1.{slot + 1}:{port}", Invite("uid", 1, slot, "pod", "boot", address))
                inviter.post(address, Invite("uid", 1, 150, "pod", "boot", address))
                async with asyncio.timeout(sockets.ANSWER_SECONDS + 5):
                    await invited.wait()

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/member", "/v1/operator"])
def test_a_stream_that_is_cut_off_before_it_is_open_is_no_error(
    path: str, trust: Trust, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        job, settings = SimpleNamespace(spec={"gpusPerNode": 1}), SimpleNamespace(bind="")
        agent = SimpleNamespace(trust=trust, snapshots=None, job=job, settings=settings)
        async with serving(Server(agent).app) as address:  # type: ignore[arg-type]
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port))) as member:
                await asyncio.sleep(0.05)
                member.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
                member.sendall(UPGRADE.format(path=path).encode())
            await asyncio.sleep(0.1)

    asyncio.run(main())
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
