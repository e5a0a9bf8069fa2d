"""An agent whose workers go on from generation to generation in the same process keeps nothing of those before."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from lockstep_api.messages import Rendezvous, Start, Term
from lockstep_trainer.agent.settings import Job, Settings
from lockstep_trainer.agent.worker import Worker
from lockstep_trainer.agent.workers import Workers
from lockstep_trainer.agent.zygote_client import ZygoteClient
from lockstep_trainer.control import CONTROL_SIGNAL, IDLE
from lockstep_trainer.protocol import events
from lockstep_trainer.supervisor import write_json
from lockstep_trainer.zygote import start_time

JOB = Job(name="job", namespace="default", uid="uid", spec={"nodes": 1, "gpusPerNode": 1})


class Zygote(ZygoteClient):
    """Forks a process that does nothing and heeds no order."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    async def request(self, **request: Any) -> dict[str, Any]:
        process = subprocess.Popen(["env", f"--ignore-signal={int(CONTROL_SIGNAL)}", "sleep", "1000"])
        self.processes.append(process)
        folder = Path(request["folder"])
        (folder / "output.log").touch()
        write_json(folder / "pid.json", {"pid": process.pid, "start": start_time(process.pid), "home": str(folder)})
        return {}


@asynccontextmanager
async def workers_of(run_dir: Path, said: list[events.Event]) -> AsyncIterator[Workers]:
    names = ("POD_NAME", "POD_UID", "HOST", "BIND", "CONFIG_DIR", "TOKEN_DIR", "DATA_DIR")
    settings = Settings.from_env({"LOCKSTEP_RUN_DIR": str(run_dir), **{f"LOCKSTEP_{name}": "any" for name in names}})
    zygote = Zygote()
    workers = Workers(settings, JOB, zygote, said.append, look=lambda: None)
    poll = asyncio.create_task(workers.poll())
    try:
        yield workers
    finally:
        for process in zygote.processes:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        poll.cancel()
        await workers.all_ended()
    assert len(zygote.processes) == 1, "all generations in one process"


async def generation(workers: Workers, number: int, said: list[events.Event]) -> weakref.ref[Worker]:
    """The next one begins, and its worker leaves it."""
    start = Start("uid", Term(1, number), 1, 1, Rendezvous("127.0.0.1", 1, f"1/{number}"), None)
    workers.launch(start, 0)
    worker = workers.current(0)
    assert worker is not None
    async with asyncio.timeout(20):
        while worker.process is None:
            await asyncio.sleep(0.01)
        (worker.folder / IDLE).write_text(json.dumps({"at": 1.0}))
        while not any(isinstance(one, events.WorkerIdle) and one.term.generation == number for one in said):
            await asyncio.sleep(0.01)
    return weakref.ref(worker)


def test_a_process_that_goes_on_keeps_no_generation_before(tmp_path: Path) -> None:
    async def main() -> None:
        said: list[events.Event] = []
        async with workers_of(tmp_path, said) as workers:
            seen = [await generation(workers, number, said) for number in range(1, 6)]
            gc.collect()
            assert [one() is not None for one in seen] == [False] * 4 + [True]

    asyncio.run(main())
