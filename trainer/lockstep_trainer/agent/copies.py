"""Copies of snapshots at other agents: this pod's to its buddy, and back when a slot has moved.

``PUT /v1/snapshots/{rank}/{state}`` leaves one at an agent, ``GET`` fetches one that it has, its own or a copy.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from lockstep_api.messages import Start, StateId
from lockstep_trainer.agent.transfer import NoRoomError, discard_if_damaged, name_of, receive, send, state_named
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.checkpoint.snapshots import (
    BUFFERS,
    COPIES,
    NoSnapshotError,
    SnapshotBusyError,
    held,
    order,
    rank_folder,
    reading,
)
from lockstep_trainer.errors import Corrupt
from lockstep_trainer.protocol.events import Event, StateCopied

if TYPE_CHECKING:
    from lockstep_trainer.agent.snapshots import Snapshots

log = logging.getLogger(__name__)

_PATH = "/v1/snapshots/{rank:\\d+}/{state:\\d+-\\d+-\\d+}"
_TIMEOUT = ClientTimeout(total=None, sock_connect=3.0, sock_read=60.0)
"""The answer to a PUT comes when the copy is verified."""
_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)


class Copies:
    """The client: one copy on its way at a time."""

    def __init__(self, snapshots: Snapshots, ranks_per_slot: int, trust: Trust, tell: Callable[[Event], None]) -> None:
        self._snapshots, self._ranks_per_slot, self._trust, self._tell = snapshots, ranks_per_slot, trust, tell
        self._task: asyncio.Task[None] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self.session: ClientSession | None = None
        """Set while the agent runs."""

    def copy(self, state: StateId, buddy: str, keep: StateId | None, slot: int) -> None:
        """Bring the slot's snapshot of ``state`` to ``buddy`` (host:port); an older one that is under way is given up.
        Told by StateCopied when all ranks are there and verified."""
        if self._task:
            self._task.cancel()
        self._task = asyncio.create_task(self._copy(state, buddy, keep, slot))

    def fetch(self, start: Start, slot: int) -> asyncio.Task[None] | None:
        """Fetch what the slot is to start from, where another agent has it. What can't be had is not there: the workers
        then restore from the store."""
        source = start.memory.sources[slot] if start.memory else ""
        if not source:
            return None
        assert start.memory is not None
        self.stop_fetching()
        self._fetching = asyncio.create_task(self._fetch(start.memory.state, source, slot))
        return self._fetching

    def stop_fetching(self) -> None:
        """The generation is over before it began."""
        if self._fetching:
            self._fetching.cancel()
            self._fetching = None

    def close(self) -> None:
        """Stop for good."""
        self.stop_fetching()
        if self._task:
            self._task.cancel()

    def _ranks(self, slot: int) -> range:
        return range(slot * self._ranks_per_slot, (slot + 1) * self._ranks_per_slot)

    async def _copy(self, state: StateId, buddy: str, keep: StateId | None, slot: int) -> None:
        left, attempt = list(self._ranks(slot)), 0
        while left:
            try:
                await self._put(left[0], state, buddy, keep)
            except (SnapshotBusyError, ClientError, OSError, TimeoutError) as error:
                log.debug("copy of step %d to %s: %s", state.step, buddy, error)
            except Corrupt as error:  # on the way, or here already
                log.warning("copy of step %d to %s: %s", state.step, buddy, error)
                if await asyncio.to_thread(discard_if_damaged, rank_folder(self._snapshots.root, left[0]), state):
                    self._snapshots.look()
                    return  # as below
            except NoSnapshotError as error:
                log.warning("copy to %s: %s", buddy, error)
                return  # overwritten or dropped; what is held is told besides
            except Exception:  # a task that ends without a word would be waited for for ever
                log.exception("copy of step %d to %s", state.step, buddy)
            else:
                left.pop(0)
                continue
            await asyncio.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)] * random.uniform(0.5, 1.5))
            attempt += 1
        self._tell(StateCopied(state))

    async def _put(self, rank: int, state: StateId, buddy: str, keep: StateId | None) -> None:
        assert self.session is not None
        url = self._trust.url(buddy, f"/v1/snapshots/{rank}/{name_of(state)}")
        with reading(rank_folder(self._snapshots.root, rank), state) as own:
            parameters = {"keep": name_of(keep)} if keep else {}
            async with self.session.put(
                url, params=parameters, data=send(own), timeout=_TIMEOUT, **self._trust.call()
            ) as answer:
                if answer.status == 400:
                    raise Corrupt(await answer.text())
                if answer.status != 204:
                    raise ConnectionError(f"{answer.status}: {await answer.text()}")

    async def _fetch(self, state: StateId, source: str, slot: int) -> None:
        for rank in self._ranks(slot):
            try:
                await self._get(rank, state, source)
            except (ClientError, OSError, TimeoutError, Corrupt, NoRoomError) as error:
                log.warning(
                    "the snapshot of step %d of rank %d can't be had from %s: %s", state.step, rank, source, error
                )
                return

    async def _get(self, rank: int, state: StateId, source: str) -> None:
        assert self.session is not None
        url = self._trust.url(source, f"/v1/snapshots/{rank}/{name_of(state)}")
        async with self.session.get(url, timeout=_TIMEOUT, **self._trust.call()) as answer:
            if answer.status != 200:
                raise ConnectionError(f"{answer.status}: {await answer.text()}")
            await receive(
                answer.content.iter_any(),
                rank_folder(self._snapshots.root, rank),
                state,
                buffers=BUFFERS,
                may_take=lambda other: order(other) < order(state),
            )
        self._snapshots.look()


class CopyRoutes:
    """The server."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def routes(self) -> list[web.RouteDef]:
        """For the agent's server."""
        return [web.put(_PATH, self._put), web.get(_PATH, self._get)]

    async def _put(self, request: web.Request) -> web.Response:
        rank, state = _of(request)
        must_stay = {self._snapshots.kept}
        if keep := request.query.get("keep"):
            try:
                must_stay.add(state_named(keep))
            except ValueError:
                raise web.HTTPBadRequest(text=f"keep is {keep!r}; write it as step-epoch-generation") from None
        try:
            await receive(
                request.content.iter_any(),
                rank_folder(self._snapshots.buddies, rank),
                state,
                buffers=COPIES,
                # An agent that was cut off may still bring what it had: never in the place of something newer.
                may_take=lambda other: other not in must_stay and order(other) < order(state),
            )
        except NoRoomError as error:
            raise web.HTTPConflict(text=str(error)) from None
        except Corrupt as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        self._snapshots.look()
        return web.Response(status=204)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        rank, state = _of(request)
        for root in (self._snapshots.root, self._snapshots.buddies):
            folder = rank_folder(root, rank)
            if not any(snapshot.state == state for snapshot in held(folder).values()):
                continue
            with suppress(NoSnapshotError, Corrupt), reading(folder, state) as own:
                response = web.StreamResponse()
                await response.prepare(request)
                async for piece in send(own):
                    await response.write(piece)
                await response.write_eof()
                return response
        raise web.HTTPNotFound(text=f"no snapshot of step {state.step} of rank {rank} is here")


def _of(request: web.Request) -> tuple[int, StateId]:
    return int(request.match_info["rank"]), state_named(request.match_info["state"])
