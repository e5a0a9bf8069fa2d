"""Copies of snapshots at other agents: this pod's to its buddy, and back when a slot has moved.

All ranks' at once: small ones from agent to agent, large ones from courier to courier (``courier``), and between the
agents only where couriers can't reach each other. ``copyroutes`` is the other agent's side.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout

from lockstep_api.messages import Start, StateId
from lockstep_trainer.agent.courier import Errand
from lockstep_trainer.agent.couriers import CourierError, Couriers
from lockstep_trainer.agent.snapshots import Snapshots
from lockstep_trainer.agent.transfer import discard_if_damaged, name_of, receive, send
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.checkpoint.snapshots import BUFFERS, NoSnapshotError, SnapshotBusyError, rank_folder, reading
from lockstep_trainer.errors import CheckpointError, Corrupt
from lockstep_trainer.protocol.events import Event, StateCopied

log = logging.getLogger(__name__)

LARGE = 64 * 1024 * 1024
"""Bytes of a snapshot from which on it is worth a courier: a tenth of a second of an agent's time."""
_TIMEOUT = ClientTimeout(total=None, sock_connect=3.0, sock_read=60.0)
"""The answer to a PUT comes when the copy is verified."""
_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)


class _GivenUp(CheckpointError):
    """What was to be copied is not there, or can't be had."""


class Copies:
    """The client: one state on its way to the buddy at a time."""

    def __init__(self, snapshots: Snapshots, ranks_per_slot: int, trust: Trust, tell: Callable[[Event], None]) -> None:
        self._snapshots, self._ranks_per_slot, self._trust, self._tell = snapshots, ranks_per_slot, trust, tell
        self._couriers = Couriers(trust, ranks_per_slot)
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

    async def close(self) -> None:
        """Stop for good."""
        self.stop_fetching()
        if self._task:
            self._task.cancel()
        await asyncio.gather(*filter(None, (self._task, self._fetching)), return_exceptions=True)
        await self._couriers.close()

    def _ranks(self, slot: int) -> range:
        return range(slot * self._ranks_per_slot, (slot + 1) * self._ranks_per_slot)

    async def _copy(self, state: StateId, buddy: str, keep: StateId | None, slot: int) -> None:
        copied = True
        try:
            async with asyncio.TaskGroup() as ranks:
                for rank in self._ranks(slot):
                    ranks.create_task(self._bring(rank, state, buddy, keep))
        except* _GivenUp as reasons:
            log.warning("copy of step %d to %s: %s", state.step, buddy, reasons.exceptions[0])
            copied = False
        if copied:
            self._tell(StateCopied(state))

    async def _bring(self, rank: int, state: StateId, buddy: str, keep: StateId | None) -> None:
        """One rank's, however often it has to be tried."""
        folder = rank_folder(self._snapshots.root, rank)
        by_courier = True
        for attempt in itertools.count():
            try:
                await self._put(rank, state, buddy, keep, by_courier=by_courier)
            except (SnapshotBusyError, ClientError, OSError, TimeoutError) as error:
                log.debug("copy of step %d of rank %d to %s: %s", state.step, rank, buddy, error)
                by_courier = not isinstance(error, CourierError)
            except Corrupt as error:  # on the way, or here already
                if await asyncio.to_thread(discard_if_damaged, folder, state):
                    self._snapshots.look()
                    raise _GivenUp(str(error)) from error
                log.warning("copy of step %d of rank %d to %s: %s", state.step, rank, buddy, error)
            except NoSnapshotError as error:  # overwritten or dropped; what is held is told besides
                raise _GivenUp(str(error)) from error
            except Exception:  # a task that ends without a word would be waited for for ever
                log.exception("copy of step %d of rank %d to %s", state.step, rank, buddy)
            else:
                return
            await asyncio.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)] * random.uniform(0.5, 1.5))

    async def _put(self, rank: int, state: StateId, buddy: str, keep: StateId | None, *, by_courier: bool) -> None:
        assert self.session is not None
        url, folder = self._url(buddy, rank, state), rank_folder(self._snapshots.root, rank)
        options: dict[str, Any] = {"params": {"keep": name_of(keep)} if keep else {}, "timeout": _TIMEOUT}
        with reading(folder, state) as own:
            if not by_courier or own.plan.size < LARGE:
                async with self.session.put(url, data=send(own), **options, **self._trust.call()) as answer:
                    await _expect(204, answer)
                return
        async with self.session.post(url, **options, **self._trust.call()) as answer:
            if answer.status == 204:
                return
            await _expect(200, answer)
            port = (await answer.json())["port"]
        await self._couriers.carry(Errand(True, str(folder), state, call=_at(buddy, port)))

    async def _fetch(self, state: StateId, source: str, slot: int) -> None:
        try:
            async with asyncio.TaskGroup() as ranks:
                for rank in self._ranks(slot):
                    ranks.create_task(self._get(rank, state, source))
        except* (ClientError, OSError, TimeoutError, CheckpointError) as reasons:
            log.warning("a snapshot of step %d can't be had from %s: %s", state.step, source, reasons.exceptions[0])

    async def _get(self, rank: int, state: StateId, source: str) -> None:
        folder = rank_folder(self._snapshots.root, rank)
        try:
            await self._get_once(folder, rank, state, source, by_courier=True)
        except CourierError as error:
            log.warning("snapshot of step %d of rank %d: %s", state.step, rank, error)
            await self._get_once(folder, rank, state, source, by_courier=False)
        self._snapshots.look()

    async def _get_once(self, folder: Path, rank: int, state: StateId, source: str, *, by_courier: bool) -> None:
        assert self.session is not None
        url, errand = self._url(source, rank, state), Errand(False, str(folder), state, buffers=BUFFERS)
        parameters = {"from": str(LARGE)} if by_courier else {}
        async with self.session.get(url, params=parameters, timeout=_TIMEOUT, **self._trust.call()) as answer:
            await _expect(200, answer)
            if answer.content_type != "application/json":
                await receive(
                    answer.content.iter_any(), folder, state, buffers=errand.buffers, may_take=errand.may_take
                )
                return
            port = (await answer.json())["port"]
        await self._couriers.carry(replace(errand, call=_at(source, port)))

    def _url(self, address: str, rank: int, state: StateId) -> str:
        return self._trust.url(address, f"/v1/snapshots/{rank}/{name_of(state)}")


def _at(address: str, port: int) -> str:
    """Another port of the same host."""
    return f"{address.rpartition(':')[0]}:{port}"


async def _expect(status: int, answer: ClientResponse) -> None:
    """Raises Corrupt where what was sent is not whole, else ConnectionError."""
    if answer.status == 400:
        raise Corrupt(await answer.text())
    if answer.status != status:
        raise ConnectionError(f"{answer.status}: {await answer.text()}")
