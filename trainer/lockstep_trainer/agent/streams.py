"""The calls that this agent makes: the stream to its leader; and the leader's invitations."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientSession,
    ClientTimeout,
    ClientWebSocketResponse,
    TCPConnector,
    WSMsgType,
)

from lockstep_api.messages import Inventory, Invite, ToLeader
from lockstep_api.wire import WireError, decode, encode
from lockstep_trainer.agent import sockets
from lockstep_trainer.agent.channel import MAX_MESSAGE_BYTES, Channel
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.protocol import events

log = logging.getLogger(__name__)

_OPEN_SECONDS = 15.0
"""From the first packet to an open stream. A leader of 2,000 members has 5 s of work with their handshakes."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_INVITE_SECONDS = 15.0
"""For an answer: as many handshakes as a leader's members, all begun at once."""


def session() -> ClientSession:
    """For an agent's calls. Without aiohttp's limit of 100 connections: so many members that are silent would keep all
    others from being called."""
    connector = TCPConnector(socket_factory=sockets.outgoing, limit=0)
    return ClientSession(connector=connector, timeout=ClientTimeout(total=None))


class LeaderStream:
    """The one stream to the leader, made again with growing, jittered pauses for as long as it is wanted."""

    def __init__(self, session: ClientSession, trust: Trust, tell: Callable[[events.Event], None]) -> None:
        self._session, self._trust = session, trust
        self._tell = tell
        self._task: asyncio.Task[None] | None = None
        self._channel: Channel | None = None
        self._to: tuple[str, int] | None = None
        self._call: sockets.Call | None = None
        """While the stream is being opened."""

    def open(self, leader: str, epoch: int) -> None:
        """Leave any older stream and open one to this leader. Where its host has answered already, that goes on: to
        begin again would only give the leader more to do."""
        if self._to == (leader, epoch) and self._call and self._call.answered:
            return
        self.close()
        self._to = leader, epoch
        self._task = asyncio.create_task(self._keep(leader, epoch))

    def close(self) -> None:
        """Leave."""
        if self._task:
            self._task.cancel()
            self._task = None
        self._channel = self._call = self._to = None

    def send(self, message: ToLeader) -> None:
        """Lost where there is no stream."""
        if self._channel:
            self._channel.send(message)

    async def _keep(self, leader: str, epoch: int) -> None:
        pause, said = _SHORTEST_PAUSE, ""
        while True:
            try:
                if await self._converse(leader, epoch):
                    pause, said = _SHORTEST_PAUSE, ""
            except (ClientError, OSError, TimeoutError, WireError) as error:
                said = _say(f"the leader, {leader}, can't be reached: {_named(error)}", said)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # jitter: members must not come back in step
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _converse(self, leader: str, epoch: int) -> bool:
        socket = await self._connect(self._trust.url(leader, "/v1/member"))
        channel = Channel(socket)
        self._channel = channel
        heard = False
        try:
            self._tell(events.StreamOpened(epoch))
            async for frame in socket:
                if frame.type is WSMsgType.TEXT:
                    heard = True
                    self._tell(events.LeaderSaid(epoch, decode(frame.data)))  # type: ignore[arg-type]
        finally:
            if self._channel is channel:
                self._channel = None
            channel.close()
            self._tell(events.StreamClosed(epoch))
        return heard

    async def _connect(self, url: str) -> ClientWebSocketResponse:
        connecting = self._session.ws_connect(url, heartbeat=10.0, max_msg_size=MAX_MESSAGE_BYTES, **self._trust.call())
        async with sockets.calling(_OPEN_SECONDS) as call:
            self._call = call
            try:
                socket: ClientWebSocketResponse = await connecting
            finally:
                if self._call is call:
                    self._call = None
        return socket


class Inviter:
    """Posts invitations, one at a time per address."""

    def __init__(self, session: ClientSession, trust: Trust, tell: Callable[[events.Event], None]) -> None:
        self._session, self._trust = session, trust
        self._tell = tell
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._said: dict[str, str] = {}

    def post(self, address: str, invite: Invite) -> None:
        """At once, unless one is still under way; the core repeats it."""
        if address not in self._busy:
            task = self._busy[address] = asyncio.create_task(self._post(address, invite))
            task.add_done_callback(lambda _: self._busy.pop(address, None))

    async def _post(self, address: str, invite: Invite) -> None:
        url = self._trust.url(address, "/v1/invite")
        try:
            async with (
                sockets.calling(_INVITE_SECONDS),
                self._session.post(url, data=encode(invite), **self._trust.call()) as response,
            ):
                self._said.pop(address, None)
                if response.status != 409:
                    return
                inventory = decode(await response.text())
        except (ClientError, OSError, TimeoutError, WireError) as error:
            text = f"slot {invite.slot}, {address}, can't be invited: {_named(error)}"
            self._said[address] = _say(text, self._said.get(address, ""))
            return
        if isinstance(inventory, Inventory):
            self._tell(events.InviteRefused(invite.slot, inventory))


def _say(text: str, before: str) -> str:
    """Warn of what is tried again and again once, until something else is the matter; returns ``text``."""
    log.log(logging.WARNING if text != before else logging.DEBUG, "%s", text)
    return text


def _named(error: Exception) -> str:
    cause = error.os_error if isinstance(error, ClientConnectorError) else error  # aiohttp's text names Python objects
    return f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
