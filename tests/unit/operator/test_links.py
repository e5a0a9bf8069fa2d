"""The operator's connections, against an agent's two paths served on this machine."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
from aiohttp import web

from lockstep_api.messages import FaultAck, Membership, Term
from lockstep_api.tls import Material, Rotating
from lockstep_api.v1alpha1 import TrainingJobStatus
from lockstep_api.wire import decode, encode
from lockstep_operator.links import Links
from lockstep_operator.plan.actions import Plan, Target
from lockstep_operator.plan.observed import Pod
from unit.operator.builders import CREDENTIALS, UID, fault, inventory, progress, replace_request, summary


class StandIn:
    """An agent that answers who it is and records what it is told."""

    def __init__(self, pod: Pod) -> None:
        self.pod, self.token = pod, "Bearer secret"
        self.heard: list[object] = []
        self.sockets: list[web.WebSocketResponse] = []
        self.says: list[str] = []
        self.port = 0
        self.server_context: ssl.SSLContext | None = None

    async def inventory(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == self.token
        return web.Response(text=encode(inventory(self.pod)))

    async def operator(self, request: web.Request) -> web.WebSocketResponse:
        assert request.headers["Authorization"] == self.token
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets.append(socket)
        await socket.send_str(encode(inventory(self.pod)))
        for text in self.says:
            await socket.send_str(text)
        async for frame in socket:
            self.heard.append(decode(frame.data))
        return socket

    def target(self) -> Target:
        return Target(self.pod.name, self.pod.uid, f"127.0.0.1:{self.port}", tls=self.server_context is not None)


@asynccontextmanager
async def around(stand_in: StandIn) -> AsyncIterator[Links]:
    app = web.Application()
    app.router.add_get("/v1/inventory", stand_in.inventory)
    app.router.add_get("/v1/operator", stand_in.operator)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=stand_in.server_context)
    await site.start()
    stand_in.port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:
        links = Links(session, "secret", lambda: None, asyncio.Semaphore(4), tls=CREDENTIALS.context(UID))
        try:
            yield links
        finally:
            await links.close()
            for socket in stand_in.sockets:
                await socket.close()
            await runner.cleanup()


async def until(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not question():
            await asyncio.sleep(0.01)


def run(test: Callable[[StandIn, Links], Awaitable[None]], stand_in: StandIn | None = None) -> None:
    async def main() -> None:
        agent = stand_in or StandIn(POD)
        async with around(agent) as links:
            await test(agent, links)

    asyncio.run(main())


POD = Pod("run-0-0", "uid-0", 0, 0, "Running", 0.0, running=True)
NOTHING = Plan(status=TrainingJobStatus())
MEMBERS = Membership(UID, 3, ())


def test_a_stream_carries_messages_both_ways() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        agent.says = [encode(progress(3, newest=summary(4, 0.0))), encode(fault(3, 1))]
        links.follow(replace(NOTHING, leader=agent.target()))
        await until(lambda: bool(links.leader and links.leader.connected and links.leader.faults))
        assert links.leader is not None
        assert links.leader.progress is not None
        assert links.leader.advanced is not None
        links.follow(replace(NOTHING, leader=agent.target(), send=(MEMBERS,)))
        links.follow(replace(NOTHING, leader=agent.target(), send=(MEMBERS,)))  # planned again: sent once
        links.follow(replace(NOTHING, leader=agent.target(), send=(FaultAck(UID, Term(3, 1)),)))
        await until(lambda: len(agent.heard) == 2)
        assert agent.heard == [MEMBERS, FaultAck(UID, Term(3, 1))]
        assert links.leader.faults == ()

    run(test)


def test_a_member_that_was_missed_and_has_come_is_missed_no_longer() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        agent.says = [encode(replace_request(3, 1))]
        links.follow(replace(NOTHING, leader=agent.target()))
        await until(lambda: links.leader is not None and links.leader.replace is not None)
        await agent.sockets[0].send_str(encode(progress(3, newest=summary(4, 0.0))))
        await until(lambda: links.leader is not None and links.leader.progress is not None)
        assert links.leader is not None
        assert links.leader.replace is None

    run(test)


def test_after_a_cut_the_stream_is_opened_again_and_everything_is_said_again() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        links.follow(replace(NOTHING, leader=agent.target()))
        await until(lambda: bool(links.leader and links.leader.connected))
        links.follow(replace(NOTHING, leader=agent.target(), send=(MEMBERS,)))
        await until(lambda: agent.heard == [MEMBERS])
        await agent.sockets[0].close()
        await until(lambda: len(agent.sockets) == 2)
        await until(lambda: bool(links.leader and links.leader.connected))
        links.follow(replace(NOTHING, leader=agent.target(), send=(MEMBERS,)))
        await until(lambda: agent.heard == [MEMBERS, MEMBERS])

    run(test)


def test_an_address_with_a_new_owner_is_no_leader() -> None:
    """Pod addresses are used again: the inventory's uid tells who answers."""

    async def test(agent: StandIn, links: Links) -> None:
        links.follow(replace(NOTHING, leader=replace(agent.target(), uid="uid-of-a-pod-that-is-gone")))
        await until(lambda: len(agent.sockets) >= 2)  # it was tried, and tried again
        assert links.leader is not None
        assert not links.leader.connected

    run(test)


def test_an_answer_from_before_a_container_restart_is_forgotten() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        links.follow(replace(NOTHING, probe=(agent.target(),)))
        await until(lambda: POD.uid in links.agents((POD,)))
        assert links.agents((replace(POD, restarts=1),)) == {}
        assert links.agents((POD,)) == {}

    run(test)


def test_another_leader_starts_from_nothing() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        agent.says = [encode(fault(3, 1))]
        links.follow(replace(NOTHING, leader=agent.target()))
        await until(lambda: bool(links.leader and links.leader.faults))
        links.follow(replace(NOTHING, leader=replace(agent.target(), pod="run-0-1", uid="uid-1")))
        assert links.leader is not None
        assert (links.leader.pod_uid, links.leader.faults, links.leader.connected) == ("uid-1", (), False)

    run(test)


def test_a_text_that_is_no_message_closes_the_stream_and_nothing_else() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        agent.says = ['{"kind": "Surprise"}']
        links.follow(replace(NOTHING, leader=agent.target()))
        await until(lambda: len(agent.sockets) >= 2)
        assert links.leader is not None

    run(test)


def test_an_agent_that_goes_before_its_first_word_is_dialled_again() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        links.follow(replace(NOTHING, leader=agent.target()))
        await until(lambda: bool(links.leader and links.leader.connected))

    class Leaving(StandIn):
        async def operator(self, request: web.Request) -> web.WebSocketResponse:
            if self.sockets:
                return await super().operator(request)
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            self.sockets.append(socket)
            await socket.close()
            return socket

    run(test, Leaving(POD))


def test_a_stream_that_has_failed_is_opened_again() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        connect = links._one_connection

        async def fail(target: Target) -> bool:
            links._one_connection = connect  # type: ignore[method-assign]
            raise RuntimeError("a defect")

        links._one_connection = fail  # type: ignore[method-assign]
        links.follow(replace(NOTHING, leader=agent.target()))
        await until(lambda: bool(links._stream and links._stream.done()))
        links.follow(replace(NOTHING, leader=agent.target()))
        await until(lambda: bool(links.leader and links.leader.connected))

    run(test)


def test_an_end_that_comes_while_a_stream_is_given_up_is_an_end() -> None:
    """Once the job's end came just when the stream's sender was being stopped, was taken for the sender's, and the
    links went on for ever."""

    async def test(agent: StandIn, links: Links) -> None:
        started, stopping = asyncio.Event(), asyncio.Event()

        async def hold_on(socket: aiohttp.ClientWebSocketResponse) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                stopping.set()
                await asyncio.sleep(0)  # takes a moment to end
                raise

        links._send_all = hold_on  # type: ignore[method-assign]
        links.follow(replace(NOTHING, leader=agent.target()))
        async with asyncio.timeout(20):
            await started.wait()
            await agent.sockets[0].send_str('{"kind": "Surprise"}')
            await stopping.wait()
            await links.close()

    run(test)


def server_context(uid: str) -> ssl.SSLContext:
    secret = CREDENTIALS.secret(uid)
    return Material(secret["tls.crt"], secret["tls.key"], secret["ca.crt"]).server()


def test_pods_with_tls_and_pods_of_before_are_reached_by_the_same_operator() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        links.follow(replace(NOTHING, leader=agent.target(), probe=(agent.target(),)))
        await until(lambda: bool(links.leader and links.leader.connected))
        await until(lambda: POD.uid in links.agents((POD,)))

    plain, with_tls = StandIn(POD), StandIn(POD)
    with_tls.server_context = server_context(UID)
    run(test, plain)
    run(test, with_tls)


def test_an_address_that_another_jobs_pod_has_now_is_not_told_the_token() -> None:
    async def test(agent: StandIn, links: Links) -> None:
        links.follow(replace(NOTHING, leader=agent.target()))
        await until(lambda: len(handshakes) > 1)  # the first has failed
        assert agent.sockets == []
        assert links.leader is not None
        assert not links.leader.connected

    handshakes: list[None] = []
    stranger = StandIn(POD)
    stranger.token = "never to be seen here"
    context = server_context("another job")

    def handshake() -> ssl.SSLContext:
        handshakes.append(None)
        return context

    stranger.server_context = Rotating(handshake)
    run(test, stranger)
