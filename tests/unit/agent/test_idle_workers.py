"""A process that has left its generation and waits for the next one always belongs to somebody, who ends it."""

from __future__ import annotations

import asyncio
import os
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lockstep_api.messages import Rendezvous, Start, Term
from lockstep_trainer.agent.settings import Job, Settings
from lockstep_trainer.agent.workers import Workers
from lockstep_trainer.agent.zygote_client import ZygoteClient
from lockstep_trainer.control import IDLE
from lockstep_trainer.protocol import events
from lockstep_trainer.supervisor import write_json
from lockstep_trainer.zygote import start_time

JOB = Job(name="job", namespace="default", uid="uid", spec={"nodes": 1, "gpusPerNode": 1})


class Zygote(ZygoteClient):
    """Forks processes that do nothing, and keeps their exit codes."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        self._reaping: set[asyncio.Task[None]] = set()

    async def request(self, **request: Any) -> dict[str, Any]:
        process, folder = await asyncio.create_subprocess_exec("sleep", "1000"), Path(request["folder"])
        self.processes.append(process)
        self._reaping.add(asyncio.create_task(self._reap(process, folder)))
        (folder / "output.log").touch()
        write_json(folder / "pid.json", {"pid": process.pid, "start": start_time(process.pid)})
        return {}

    async def ready(self) -> None:
        return

    async def _reap(self, process: Process, folder: Path) -> None:
        write_json(folder / "exit.json", {"pid": process.pid, "code": await process.wait(), "at": time.time()})

    @property
    def alive(self) -> list[int]:
        """Pids of those that have not ended."""
        return [process.pid for process in self.processes if process.returncode is None]

    async def end(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*self._reaping)


def start(number: int) -> Start:
    return Start("uid", Term(1, number), 1, 1, Rendezvous("127.0.0.1", 1, f"1/{number}"), None)


def ended(said: Sequence[events.Event]) -> list[int]:
    """Generations whose worker has ended."""
    return [one.term.generation for one in said if isinstance(one, events.WorkerEnded)]


def open_files(folder: Path) -> set[Path]:
    """Of this process, in ``folder``."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one of the listing itself
            found.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    return {path for path in found if path.is_relative_to(folder)}


async def until(question: Callable[[], bool]) -> None:
    while not question():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("abandoned_at_once", [True, False])
def test_a_generation_abandoned_before_it_began_leaves_no_process_behind(
    tmp_path: Path, abandoned_at_once: bool
) -> None:
    """Its snapshot is still being fetched when a fault elsewhere ends it; the next one begins in a fresh process."""

    async def main() -> None:
        names = ("POD_NAME", "POD_UID", "HOST", "BIND", "CONFIG_DIR", "TOKEN_DIR", "DATA_DIR")
        environment = {"LOCKSTEP_RUN_DIR": str(tmp_path), **{f"LOCKSTEP_{name}": "any" for name in names}}
        said: list[events.Event] = []
        zygote = Zygote()
        workers = Workers(Settings.from_env(environment), JOB, zygote, said.append)
        poll = asyncio.create_task(workers.poll())

        async with asyncio.timeout(20):
            workers.launch(start(1), 0)
            await until(lambda: bool(zygote.alive))
            (workers.folder(Term(1, 1), 0) / IDLE).write_text('{"at": 1.0}')
            await until(lambda: any(isinstance(one, events.WorkerIdle) for one in said))
            fetch: asyncio.Task[None] = asyncio.create_task(asyncio.sleep(1000))
            workers.launch(start(2), 0, before=fetch)
            if not abandoned_at_once:
                await asyncio.sleep(0)
            fetch.cancel()
            workers.leave(Term(1, 2))
            await until(lambda: 2 in ended(said))
            workers.launch(start(3), 0)
            await until(lambda: len(zygote.processes) == 2)
            assert zygote.alive == [zygote.processes[1].pid]
            workers.kill(Term(2, 0))
            await workers.all_ended()
        assert zygote.alive == []
        assert sorted(ended(said)) == [1, 2, 3]
        assert open_files(tmp_path) == {workers.folder(Term(1, 3), 0) / "output.log"}, "those of the newest generation"
        poll.cancel()
        await zygote.end()

    asyncio.run(main())
