"""The agent's port: streams of members and operator, inventory, invitations, metrics, and workers' logs, profiles and
faults."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp import WSMsgType, web

from lockstep_api import constants
from lockstep_api.messages import Invite, Join, ToMember, ToOperator
from lockstep_api.wire import WireError, decode, encode
from lockstep_trainer.agent.channel import MAX_MESSAGE_BYTES, Channel
from lockstep_trainer.agent.copyroutes import CopyRoutes
from lockstep_trainer.agent.faults import Faults
from lockstep_trainer.agent.output import tail
from lockstep_trainer.agent.profiles import Profiles
from lockstep_trainer.protocol import events

if TYPE_CHECKING:
    from lockstep_trainer.agent.agent import Agent

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_OPEN_PATHS = frozenset({"/healthz", "/metrics"})
_OPERATORS_PATH = "/v1/operator"
_PEOPLES_PATHS = "/v1/workers/"
"""Reached through the API server's proxy, which shows no certificate: its caller's rights and the token have to do."""
_JOIN_SECONDS = 10.0


class Server:
    """Routes, and the streams that others have opened."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._numbers = itertools.count(1)
        self._members: dict[int, Channel] = {}
        self._operators: dict[int, Channel] = {}
        self._copies = CopyRoutes(agent.snapshots, agent.job.spec["gpusPerNode"], agent.trust, agent.settings.bind)
        self.app = web.Application(middlewares=[self._authenticate])
        open_routes = [web.get("/healthz", self._health), web.get("/metrics", self._metrics)]
        self.open_app = web.Application()
        """What needs neither token nor certificate, for a port of its own without TLS."""
        self.open_app.add_routes(open_routes)
        self.app.add_routes(
            [
                *open_routes,
                web.get("/v1/inventory", self._inventory),
                web.post("/v1/invite", self._invite),
                web.get("/v1/member", self._member),
                web.get(_OPERATORS_PATH, self._operator),
                web.get("/v1/workers/{rank:\\d+}/log", self._log),
                *Profiles(agent).routes(),
                *Faults(agent).routes(),
                *self._copies.routes(),
            ]
        )

    # ----------------------------------------------------------------------------------- streams out

    def send_member(self, connection: int, message: ToMember) -> None:
        """To a member; lost where its stream is gone."""
        if channel := self._members.get(connection):
            channel.send(message)

    def drop_member(self, connection: int) -> None:
        """Close a member's stream."""
        if channel := self._members.pop(connection, None):
            channel.close()

    def send_operator(self, message: ToOperator) -> None:
        """To whoever has opened an operator's stream."""
        for channel in self._operators.values():
            channel.send(message)

    async def close(self) -> None:
        """End all streams, after what is queued was sent."""
        await self._copies.close()
        channels = [*self._operators.values(), *self._members.values()]
        await asyncio.gather(*(channel.flush() for channel in channels), return_exceptions=True)

    # ------------------------------------------------------------------------------------- handlers

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        path = resource.canonical if resource else ""
        if path not in _OPEN_PATHS:
            # The API server's proxy keeps Authorization to itself: who comes through it uses the other header.
            bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
            given = request.headers.get(constants.TOKEN_HEADER, bearer)
            if not self._agent.trust.knows(given):
                raise web.HTTPUnauthorized(text="the bearer token of this job is missing or wrong")
            certificate = request.transport.get_extra_info("peercert") if request.transport else None
            refusal = self._agent.trust.refusal(
                certificate,
                operator_only=path == _OPERATORS_PATH,
                needed=not path.startswith(_PEOPLES_PATHS),
            )
            if refusal:
                raise web.HTTPForbidden(text=refusal)
        return await handler(request)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _metrics(self, request: web.Request) -> web.Response:
        from lockstep_trainer.agent.metrics import render

        body, content_type = render(self._agent, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _inventory(self, _: web.Request) -> web.Response:
        return self._json(self._agent.inventory())

    async def _invite(self, request: web.Request) -> web.Response:
        try:
            invite = decode(await request.text())
        except WireError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        if not isinstance(invite, Invite):
            raise web.HTTPBadRequest(text=f"an Invite was expected, not {invite.kind}")
        if not self._agent.node.member.accepts(invite):
            return self._json(self._agent.inventory(), status=409)
        self._agent.tell(events.Invited(invite))
        return self._json(self._agent.inventory())

    async def _member(self, request: web.Request) -> web.StreamResponse:
        socket = await _open(request)
        if socket is None:
            return web.Response()
        connection = next(self._numbers)
        channel = self._members[connection] = Channel(socket)
        try:
            first = decode(await socket.receive_str(timeout=_JOIN_SECONDS))
            if not isinstance(first, Join):
                raise WireError(f"the first message of a member is Join, not {first.kind}")
            self._agent.tell(events.MemberConnected(connection, first))
            async for frame in socket:
                if frame.type is WSMsgType.TEXT:
                    self._agent.tell(events.MemberSaid(connection, decode(frame.data)))  # type: ignore[arg-type]
        except (WireError, TypeError, TimeoutError) as error:
            log.warning("member stream %d: %s", connection, error)
        finally:
            self._members.pop(connection, None)
            channel.close()
            self._agent.tell(events.MemberClosed(connection))
        return socket

    async def _operator(self, request: web.Request) -> web.StreamResponse:
        socket = await _open(request)
        if socket is None:
            return web.Response()
        connection = next(self._numbers)
        channel = self._operators[connection] = Channel(socket)
        channel.send(self._agent.inventory())
        self._agent.tell(events.OperatorConnected())
        try:
            async for frame in socket:
                if frame.type is WSMsgType.TEXT:
                    self._agent.tell(events.OperatorSaid(decode(frame.data)))  # type: ignore[arg-type]
        except WireError as error:
            log.warning("operator stream: %s", error)
        finally:
            del self._operators[connection]
            channel.close()
            if not self._operators:
                self._agent.tell(events.OperatorClosed())
        return socket

    async def _log(self, request: web.Request) -> web.Response:
        rank = int(request.match_info["rank"])
        wanted = request.query.get("tail", "200")
        if not wanted.isdigit():
            raise web.HTTPBadRequest(text=f"tail is {wanted!r}; it must be a number of lines")
        start = self._agent.newest_start
        folders = self._agent.settings.run_dir / "workers"
        candidates = sorted(folders.glob(f"e*-g*-r{rank}/output.log"), key=lambda path: path.stat().st_mtime)
        if not candidates:
            held = f"this node holds ranks {self._agent.ranks()}" if start else "no worker was started here yet"
            raise web.HTTPNotFound(text=f"no output of rank {rank}: {held}")
        text = "\n".join(tail(candidates[-1], int(wanted)))
        return web.Response(text=text + "\n" if text else "")

    def _json(self, message: ToOperator, status: int = 200) -> web.Response:
        return web.Response(text=encode(message), content_type="application/json", status=status)


async def _open(request: web.Request) -> web.WebSocketResponse | None:
    """A stream to whoever asks for it; None where it was cut off meanwhile: who wants it asks again."""
    socket = web.WebSocketResponse(heartbeat=10.0, max_msg_size=MAX_MESSAGE_BYTES)
    try:
        await socket.prepare(request)
    except ConnectionError as error:
        log.debug("a stream was cut off before it was open: %s", error)
        return None
    return socket
