"""``/v1/workers/{rank}/faults``: hands faults that somebody orders to this node's workers, where that is allowed.

Whoever leads hears of each before it is carried out, so that nobody takes it for a real one. The files are in
``lockstep_trainer.injection.faultorders``; ``lockstep_trainer.injection.faultwatch`` is the other end.
"""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from lockstep_api.messages import Injection
from lockstep_trainer.agent.spoil import spoil_memory
from lockstep_trainer.errors import TrainerError
from lockstep_trainer.injection import faultorders
from lockstep_trainer.injection.faultorders import Order
from lockstep_trainer.protocol.events import FaultOrdered
from lockstep_trainer.supervisor import read_json, write_json

if TYPE_CHECKING:
    from lockstep_trainer.agent.agent import Agent
    from lockstep_trainer.agent.worker import Worker

NOT_ALLOWED = (
    "faults may not be made here: the administrator allows them by the chart's value faultInjection.enabled, for pods "
    "made from then on (a local run: `lockstep run --fault-injection`)"
)


class Faults:
    """The routes."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[web.RouteDef]:
        """For the agent's server."""
        path = "/v1/workers/{rank:\\d+}/faults"
        return [
            web.post(path, self._order),
            web.get(path, self._status),
            web.delete(path, self._withdraw),
            web.post("/v1/workers/{rank:\\d+}/shards/{where:memory|store}", self._spoil),
        ]

    async def _order(self, request: web.Request) -> web.Response:
        worker = self._worker(request)
        order = _parse(await request.text())
        folder = self._folder(worker)
        if (before := _standing(folder)) is not None:
            raise web.HTTPConflict(
                text=f"rank {worker.rank} has a fault already ({before.describe()}); withdraw it with --clear first"
            )
        self._tell(order.id, worker, order.describe())
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / faultorders.ORDER, order.document())
        return web.json_response({"id": order.id, "rank": worker.rank, "what": order.describe()}, status=202)

    async def _spoil(self, request: web.Request) -> web.Response:
        worker = self._worker(request)
        where, identity = request.match_info["where"], uuid.uuid4().hex[:12]
        self._tell(identity, worker, f"a byte flips in its shard in {'memory' if where == 'memory' else 'the store'}")
        try:
            if where == "memory":
                what = spoil_memory(self._agent.snapshots.root, worker.rank)
            else:
                what = await self._agent.durable.spoil(worker.rank)
        except TrainerError as error:
            self._tell(uuid.uuid4().hex[:12], worker, f"nothing: {error}")
            raise web.HTTPConflict(text=str(error)) from None
        return web.json_response({"id": identity, "rank": worker.rank, "what": what})

    async def _status(self, request: web.Request) -> web.Response:
        folder = self._folder(self._worker(request))
        order = read_json(folder / faultorders.ORDER)
        status = read_json(folder / faultorders.STATUS)
        if order and (status is None or status["id"] != order["id"]):
            status = {"id": order["id"], "state": "ordered", "message": "no step has begun since"}
        return web.json_response(status or {"id": "", "state": "none", "message": "no fault was ordered"})

    async def _withdraw(self, request: web.Request) -> web.Response:
        worker = self._worker(request)
        folder = self._folder(worker)
        order = _standing(folder)
        with suppress(FileNotFoundError):
            (folder / faultorders.ORDER).unlink()
        if order is None:
            raise web.HTTPNotFound(text=f"rank {worker.rank} has no fault that could be withdrawn")
        self._tell(uuid.uuid4().hex[:12], worker, f"withdrawn: {order.describe()}")
        return web.json_response({"what": order.describe()})

    def _tell(self, identity: str, worker: Worker, what: str) -> None:
        self._agent.tell(FaultOrdered(Injection(identity, worker.rank, self._agent.clock(), what)))

    def _folder(self, worker: Worker) -> Path:
        local = worker.rank % int(self._agent.job.spec["gpusPerNode"])
        return self._agent.settings.run_dir / faultorders.FOLDER / str(local)

    def _worker(self, request: web.Request) -> Worker:
        rank = int(request.match_info["rank"])
        if not self._agent.settings.fault_injection:
            raise web.HTTPConflict(text=NOT_ALLOWED)
        if self._agent.job.command:
            raise web.HTTPConflict(text="this job runs spec.command; faults are made in Lockstep's own trainer only")
        worker = self._agent.workers.current(rank)
        if worker is None:
            raise web.HTTPNotFound(text=f"rank {rank} is not here: this node holds ranks {self._agent.ranks()}")
        if worker.ended and request.method == "POST":
            raise web.HTTPConflict(text=f"rank {rank} is not running; ask again once the job runs")
        return worker


def _parse(text: str) -> Order:
    try:
        raw: Any = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError('a request is {"kind": "flip", "site": "gradient", …}')
        return Order.parse(raw)
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from None


def _standing(folder: Path) -> Order | None:
    """The order that is not over."""
    raw = read_json(folder / faultorders.ORDER)
    status = read_json(folder / faultorders.STATUS)
    if raw is None or (status and status["id"] == raw["id"] and status["state"] in ("done", "refused")):
        return None
    return Order(**raw)
