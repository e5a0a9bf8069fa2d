"""Snapshots at this agent, for others: ``/v1/snapshots/{rank}/{state}``.

``GET`` answers with one that it has, its own or a copy; with ``?from=BYTES``, where it is as large as that, with the
port of a courier that gives it, as JSON. ``PUT`` leaves a copy here. ``POST`` answers with the port of a courier that
takes one in, or with 204 where it is here already.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from aiohttp import web

from lockstep_api.messages import StateId
from lockstep_trainer.agent.courier import Errand
from lockstep_trainer.agent.couriers import Couriers
from lockstep_trainer.agent.snapshots import Snapshots
from lockstep_trainer.agent.transfer import NoRoomError, has_room, receive, send, state_named
from lockstep_trainer.agent.trust import Trust
from lockstep_trainer.checkpoint.snapshots import COPIES, NoSnapshotError, held, rank_folder, reading
from lockstep_trainer.errors import CheckpointError, Corrupt

log = logging.getLogger(__name__)

_PATH = r"/v1/snapshots/{rank:\d+}/{state:\d+-\d+-\d+}"


class CopyRoutes:
    """The server."""

    def __init__(self, snapshots: Snapshots, ranks_per_slot: int, trust: Trust, bind: str) -> None:
        """``bind``: the address that couriers listen at."""
        self._snapshots, self._bind = snapshots, bind
        # Not those that call: with all of them waiting for couriers elsewhere, a ring of pods would wait for ever.
        self._couriers = Couriers(trust, ranks_per_slot)
        self._errands: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.RouteDef]:
        """For the agent's server."""
        return [web.get(_PATH, self._get), web.put(_PATH, self._put), web.post(_PATH, self._post)]

    async def close(self) -> None:
        """End what is under way."""
        for errand in self._errands:
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        await self._couriers.close()

    async def _get(self, request: web.Request) -> web.StreamResponse:
        rank, state = _of(request)
        large = int(request.query.get("from", 1 << 62))
        for root in (self._snapshots.root, self._snapshots.buddies):
            folder = rank_folder(root, rank)
            if not any(snapshot.state == state for snapshot in held(folder).values()):
                continue
            with suppress(NoSnapshotError, Corrupt), reading(folder, state) as own:
                if own.plan.size >= large:
                    return await self._send_courier(Errand(True, str(folder), state, bind=self._bind))
                response = web.StreamResponse()
                await response.prepare(request)
                async for piece in send(own):
                    await response.write(piece)
                await response.write_eof()
                return response
        raise web.HTTPNotFound(text=f"no snapshot of step {state.step} of rank {rank} is here")

    async def _put(self, request: web.Request) -> web.Response:
        errand = self._copy(request)
        try:
            await receive(
                request.content.iter_any(),
                Path(errand.folder),
                errand.state,
                buffers=errand.buffers,
                may_take=errand.may_take,
            )
        except NoRoomError as error:
            raise web.HTTPConflict(text=str(error)) from None
        except Corrupt as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        self._snapshots.look()
        return web.Response(status=204)

    async def _post(self, request: web.Request) -> web.Response:
        errand = self._copy(request)
        folder = Path(errand.folder)
        if any(snapshot.state == errand.state for snapshot in held(folder).values()):
            return web.Response(status=204)
        if not has_room(folder, errand.buffers, errand.may_take):
            raise web.HTTPConflict(text=f"{folder}: each buffer holds what must stay")
        return await self._send_courier(errand)

    def _copy(self, request: web.Request) -> Errand:
        """What a copy that comes is taken in as. An agent that was cut off may still bring what it had: never in the
        place of something newer."""
        rank, state = _of(request)
        must_stay = [kept] if (kept := self._snapshots.kept) else []
        if keep := request.query.get("keep"):
            try:
                must_stay.append(state_named(keep))
            except ValueError:
                raise web.HTTPBadRequest(text=f"keep is {keep!r}; write it as step-epoch-generation") from None
        folder = str(rank_folder(self._snapshots.buddies, rank))
        return Errand(False, folder, state, bind=self._bind, buffers=COPIES, must_stay=tuple(must_stay))

    async def _send_courier(self, errand: Errand) -> web.Response:
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._run(errand, port.set_result))
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
        await asyncio.wait((task, port), return_when=asyncio.FIRST_COMPLETED)
        if not port.done():
            raise web.HTTPServiceUnavailable(text="no courier could listen; see this pod's log")
        return web.json_response({"port": port.result()})

    async def _run(self, errand: Errand, on_port: Callable[[int], None]) -> None:
        try:
            await self._couriers.carry(errand, on_port)
        except (OSError, CheckpointError) as error:
            log.warning("snapshot of step %d, from courier to courier: %s", errand.state.step, error)
        self._snapshots.look()


def _of(request: web.Request) -> tuple[int, StateId]:
    return int(request.match_info["rank"]), state_named(request.match_info["state"])
