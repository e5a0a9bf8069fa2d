"""Where the workers of a generation meet: a store that outlives them all, or, for a user's script, a free port."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from lockstep_trainer.agent.process import Watched
from lockstep_trainer.agent.settings import Job, Settings
from lockstep_trainer.agent.zygote_client import ZygoteClient, ZygoteError, ZygoteGoneError
from lockstep_trainer.protocol.events import Event, StoreLost, StoreReady
from lockstep_trainer.supervisor import read_json, write_json

log = logging.getLogger(__name__)


class RendezvousStore:
    """The store process; a new agent goes on with the one that an earlier agent started."""

    def __init__(self, settings: Settings, job: Job, zygote: ZygoteClient, tell: Callable[[Event], None]) -> None:
        self._settings = settings
        self._script = job.command is not None
        self._zygote = zygote
        self._tell = tell
        self._folder = settings.run_dir / "store"
        self._process: Watched | None = None
        self._port = 0
        self._task: asyncio.Task[None] | None = None

    def ensure(self) -> None:
        """Have one, and tell where; tell too when it is lost."""
        if self._script:
            # The port is free now and used in a moment; where another takes it first, the generation fails and the
            # next one gets another.
            with socket.create_server((self._settings.bind, 0)) as probe:
                port = probe.getsockname()[1]
            self._tell(StoreReady(self._settings.host, port))
        elif self._process and not self._process.gone:
            self._tell(StoreReady(self._settings.host, self._port))
        elif self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            process = self._adopt() or await self._start()
        except ZygoteError as error:
            log.warning("rendezvous store: %s", error)
            await asyncio.sleep(0.1)
            self._task = None
            self._tell(StoreLost(str(error)))
            return
        self._process = process
        self._tell(StoreReady(self._settings.host, self._port))
        end = await process.wait(0.0)
        self._process = None
        self._task = None
        self._tell(StoreLost(f"the rendezvous store ended with {end.code}"))

    def _adopt(self) -> Watched | None:
        pid, port = read_json(self._folder / "pid.json"), read_json(self._folder / "port.json")
        if not pid or not port:
            return None
        self._port = port["port"]
        return Watched.open(pid["pid"], pid["start"], self._folder, self._settings.run_dir / "exits")

    async def _start(self) -> Watched:
        request = {"op": "store", "folder": str(self._folder), "host": self._settings.bind}
        try:
            answer = await self._zygote.request(**request, port=self._settings.store_port)
        except ZygoteGoneError:
            raise
        except ZygoteError:  # the port is taken, by a store that is just dying perhaps; any other will do
            answer = await self._zygote.request(**request, port=0)
        self._port = answer["port"]
        write_json(self._folder / "port.json", {"port": self._port})
        raw = read_json(self._folder / "pid.json")
        started = raw["start"] if raw else None
        process = Watched.open(answer["pid"], started, self._folder, self._settings.run_dir / "exits")
        if process is None:
            raise ZygoteGoneError("the rendezvous store ended at once; see output.log in the run folder's store/")
        return process
