"""The operator's connections to one job's agents: a stream to the leader, and questions to single members.

All it hears is kept as data (`plan.observed.Agent`, `Leader`); nothing is decided here.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import aiohttp

from lockstep_api.messages import (
    EpochRequest,
    FaultAck,
    FaultReport,
    Finished,
    FromOperator,
    Inventory,
    Message,
    Progress,
    Recovered,
    ReplaceRequest,
)
from lockstep_api.wire import WireError, decode, encode
from lockstep_operator.plan.actions import Plan, Target
from lockstep_operator.plan.observed import Agent, Leader, Pod

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
"""A ping so often; without its pong within half of that the stream counts as closed."""
CONNECT_SECONDS = 3.0
PROBE_SECONDS = 2.0
RECONNECT_SECONDS = (0.1, 1.0)
"""First and longest pause before the leader is dialled again."""
_UNREACHABLE = (aiohttp.ClientError, aiohttp.WSMessageTypeError, OSError, TimeoutError, WireError)
"""A stream that closes where a message is awaited is the second of them."""


class Links:
    """Connections of one job. ``changed`` is called whenever something was heard or lost."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        token: str,
        changed: Callable[[], None],
        probes: asyncio.Semaphore,
        *,
        tls: ssl.SSLContext,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._session, self._changed, self._probes, self._clock = session, changed, probes, clock
        self._headers = {"Authorization": f"Bearer {token}"}
        self._tls = tls
        self._agents: dict[str, Agent] = {}
        self._restarts: dict[str, int] = {}  # pod uid → restarts of its container when it answered
        self._probing: dict[str, asyncio.Task[None]] = {}
        self._target: Target | None = None
        self._stream: asyncio.Task[None] | None = None
        self._outbox: asyncio.Queue[FromOperator] = asyncio.Queue()
        self._sent: set[FromOperator] = set()  # on this connection
        self._heard = clock()
        self.leader: Leader | None = None

    def agents(self, pods: tuple[Pod, ...]) -> Mapping[str, Agent]:
        """Answers of agents whose container has not started again since; those of pods that are gone are dropped."""
        there = {pod.uid: pod for pod in pods}
        for uid in list(self._agents):
            if uid not in there or there[uid].restarts != self._restarts[uid]:
                del self._agents[uid], self._restarts[uid]
        return dict(self._agents)

    def follow(self, plan: Plan) -> None:
        """Do what the plan asks for: keep the stream to its leader, send, ask."""
        if plan.leader is None or self._target is None or plan.leader.uid != self._target.uid:
            self._drop_stream()
            if plan.leader is not None:
                self.leader = Leader(pod_uid=plan.leader.uid, connected=False, since=self._clock())
        self._target = plan.leader  # perhaps of another address, or another start of its container
        if self._stream and self._stream.done():
            self._give_up(self._stream)
        if plan.leader is not None and (self._stream is None or self._stream.done()):
            self._stream = asyncio.create_task(self._keep_stream(plan.leader), name=f"leader {plan.leader.pod}")
        for message in plan.send:
            if isinstance(message, FaultAck):
                self._forget_faults(message)
            elif message in self._sent:
                continue
            else:
                self._sent.add(message)
            self._outbox.put_nowait(message)
        for target in plan.probe:
            if target.uid not in self._probing:
                self._probing[target.uid] = asyncio.create_task(self._probe(target), name=f"probe {target.pod}")

    async def close(self) -> None:
        """End all connections."""
        tasks = [*self._probing.values(), *([self._stream] if self._stream else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------- questions

    async def _probe(self, target: Target) -> None:
        url = _url(target, "/v1/inventory")
        try:
            async with self._probes:
                timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
                async with self._session.get(url, headers=self._headers, timeout=timeout, ssl=self._tls) as response:
                    response.raise_for_status()
                    answer = decode(await response.read())
            if isinstance(answer, Inventory) and answer.pod_uid == target.uid:
                self._agents[target.uid] = Agent(answer, self._clock())
                self._restarts[target.uid] = target.restarts
                self._changed()
        except _UNREACHABLE as error:
            log.debug("%s does not answer yet: %s", target.pod, error)
        finally:
            self._probing.pop(target.uid, None)

    # ---------------------------------------------------------------------------------------------- stream

    def _drop_stream(self) -> None:
        if self._stream:
            self._stream.cancel()
        self._stream = self._target = self.leader = None
        self._sent = set()
        self._outbox = asyncio.Queue()

    async def _keep_stream(self, target: Target) -> None:
        pause = RECONNECT_SECONDS[0]
        while True:
            current = self._target or target
            try:
                if await self._one_connection(current):
                    pause = RECONNECT_SECONDS[0]
            except _UNREACHABLE as error:
                log.debug("%s: stream closed: %s", current.pod, error or type(error).__name__)
            self._lose_leader()
            await asyncio.sleep(pause)
            pause = min(2 * pause, RECONNECT_SECONDS[1])

    def _lose_leader(self) -> None:
        if self.leader and self.leader.connected:
            # Silence counts from the last word and not from the moment at which it was noticed.
            self.leader = replace(self.leader, connected=False, since=self._heard)
            self._changed()

    def _give_up(self, stream: asyncio.Task[None]) -> None:
        """A stream that nobody ended has failed as was not foreseen."""
        if not stream.cancelled():
            log.error("%s: the stream failed and is opened again", stream.get_name(), exc_info=stream.exception())
        self._lose_leader()

    async def _one_connection(self, target: Target) -> bool:
        """One stream from its start to its end; whether it got as far as an inventory."""
        url = _url(target, "/v1/operator")
        async with asyncio.timeout(CONNECT_SECONDS):
            socket = await self._session.ws_connect(
                url, headers=self._headers, heartbeat=HEARTBEAT_SECONDS, max_msg_size=64 * 2**20, ssl=self._tls
            )
        async with socket:
            async with asyncio.timeout(CONNECT_SECONDS):
                first = decode(await socket.receive_str())
            if not isinstance(first, Inventory) or first.pod_uid != target.uid:
                return False  # the address has a new owner
            self._sent, self._outbox = set(), asyncio.Queue()
            self._hear(first, connected=True)
            sender = asyncio.create_task(self._send_all(socket))
            try:
                async for frame in socket:
                    if frame.type is not aiohttp.WSMsgType.TEXT:
                        break
                    self._hear(decode(frame.data))
            finally:
                sender.cancel()
                await asyncio.wait({sender})  # awaited itself, its cancellation and ours would look the same
        return True

    async def _send_all(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        with suppress(*_UNREACHABLE):  # the receiving side notices, and dials again
            while True:
                await socket.send_str(encode(await self._outbox.get()))

    def _hear(self, message: Message, *, connected: bool = False) -> None:
        assert self.leader is not None
        now = self._heard = self._clock()
        leader = self.leader
        if connected:
            leader = replace(leader, connected=True, since=now)
        match message:
            case Inventory():
                self._agents[leader.pod_uid] = Agent(message, now)
                self._restarts[leader.pod_uid] = self._target.restarts if self._target else 0
                leader = replace(leader, inventory=message)
            case Progress():
                leader = replace(leader, progress=message, advanced=_advanced(leader, message, now))
                if message.state in ("running", "finishing"):
                    leader = replace(leader, replace=None)  # whoever was missing has come meanwhile
            case FaultReport():
                if all(known.term != message.term for known in leader.faults):
                    leader = replace(leader, faults=(*leader.faults, message))
            case Recovered():
                if all(known.term != message.term for known in leader.recovered):
                    leader = replace(leader, recovered=(*leader.recovered[-9:], message))
            case ReplaceRequest():
                leader = replace(leader, replace=message)
            case EpochRequest():
                leader = replace(leader, epoch_request=message)
            case Finished():
                leader = replace(leader, finished=message)
            case _:
                log.warning("a leader sent %s, which no leader should", message.kind)
        if leader != self.leader:
            self.leader = leader
            self._changed()

    def _forget_faults(self, ack: FaultAck) -> None:
        if self.leader:
            kept = tuple(report for report in self.leader.faults if report.term > ack.term)
            self.leader = replace(self.leader, faults=kept)


def _url(target: Target, path: str) -> str:
    return f"{'https' if target.tls else 'http'}://{target.address}{path}"


def _advanced(leader: Leader, fresh: Progress, now: float) -> float | None:
    """When the newest step was first heard of."""
    old = leader.progress.newest if leader.progress else None
    new = fresh.newest
    if new is None or (old is not None and (old.step, old.at) == (new.step, new.at)):
        return leader.advanced
    return now
