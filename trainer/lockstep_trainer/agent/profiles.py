"""``/v1/workers/{rank}/profiles``: hands requests for profiles to workers and their files to whoever asked.

A request is a file in the worker's folder; ``lockstep_trainer.profiling`` is the other end.
"""

from __future__ import annotations

import json
import shutil
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from lockstep_trainer.supervisor import read_json, write_json

if TYPE_CHECKING:
    from lockstep_trainer.agent.agent import Agent
    from lockstep_trainer.agent.worker import Worker

MOST_STEPS = 100
"""Of one trace: a step of a large model has tens of thousands of events, and the run folder is memory."""
_UNDER_WAY = ("waiting", "running", "writing")


@dataclass(frozen=True, slots=True)
class Request:
    """What ``request.json`` holds."""

    id: str
    steps: int
    trace: bool
    memory: bool

    @classmethod
    def parse(cls, text: str) -> Request:
        """A request with a new id; raises ValueError with a sentence."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the request is not JSON: {error}") from None
        if not isinstance(raw, dict) or set(raw) - {"steps", "trace", "memory"}:
            raise ValueError('a request is {"steps": 3, "trace": true, "memory": false}')
        steps, trace, memory = raw.get("steps", 3), raw.get("trace", True), raw.get("memory", False)
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"steps is {steps!r}; it must be a number from 1 to {MOST_STEPS}")
        if not isinstance(trace, bool) or not isinstance(memory, bool) or not (trace or memory):
            raise ValueError("trace and memory are true or false, and one of them is true")
        return cls(uuid.uuid4().hex[:12], steps, trace, memory)


class Profiles:
    """The routes."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[web.RouteDef]:
        """For the agent's server."""
        one = "/v1/workers/{rank:\\d+}/profiles/{id:[0-9a-f]{12}}"
        return [
            web.post("/v1/workers/{rank:\\d+}/profiles", self._ask),
            web.get(one, self._status),
            web.get(one + "/{file:[a-z0-9.-]+}", self._file),
            web.delete(one, self._remove),
        ]

    async def _ask(self, request: web.Request) -> web.Response:
        try:
            wanted = Request.parse(await request.text())
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        if self._agent.job.command:
            raise web.HTTPConflict(text="this job runs spec.command; only Lockstep's own trainer can be profiled")
        worker = self._worker(request)
        if worker.ended:
            raise web.HTTPConflict(text=f"rank {worker.rank} is not running; ask again once the job runs")
        folder = worker.folder / "profile"
        before = read_json(folder / "request.json")
        if before and _status(worker, before["id"])["state"] in _UNDER_WAY:
            raise web.HTTPConflict(text=f"rank {worker.rank} is being profiled already; wait until that is done")
        (folder / wanted.id).mkdir(parents=True)
        write_json(folder / "request.json", asdict(wanted))
        return web.json_response({"id": wanted.id, "rank": worker.rank}, status=202)

    async def _status(self, request: web.Request) -> web.Response:
        self._folder(request)
        return web.json_response(_status(self._worker(request), request.match_info["id"]))

    async def _file(self, request: web.Request) -> web.FileResponse:
        path = self._folder(request) / request.match_info["file"]
        if not path.is_file():
            raise web.HTTPNotFound(text=f"this profile has no file {path.name}")
        # As it is: a .gz must not be unpacked on the way.
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    async def _remove(self, request: web.Request) -> web.Response:
        folder = self._folder(request)
        asked = folder.parent / "request.json"
        if (before := read_json(asked)) and before["id"] == folder.name:
            with suppress(FileNotFoundError):
                asked.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        return web.Response(status=204)

    def _worker(self, request: web.Request) -> Worker:
        rank = int(request.match_info["rank"])
        worker = self._agent.workers.current(rank)
        if worker is None:
            raise web.HTTPNotFound(text=f"rank {rank} is not here: this node holds ranks {self._agent.ranks()}")
        return worker

    def _folder(self, request: web.Request) -> Path:
        worker = self._worker(request)
        folder = worker.folder / "profile" / request.match_info["id"]
        if not folder.is_dir():
            raise web.HTTPNotFound(text=f"rank {worker.rank} was started again since, and the profile is lost")
        return folder


def _status(worker: Worker, identity: str) -> dict[str, Any]:
    folder = worker.folder / "profile" / identity
    status = read_json(folder / "status.json") or {"state": "waiting", "message": "", "files": []}
    if not folder.is_dir():
        status["state"] = "removed"
    elif worker.ended and status["state"] in _UNDER_WAY:
        status |= {"state": "failed", "message": f"rank {worker.rank} ended before the profile was done"}
    return status
