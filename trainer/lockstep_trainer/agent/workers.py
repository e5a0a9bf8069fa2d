"""This node's worker processes: started through the zygote, watched, listened to, killed.

The core hears of each worker's end exactly once, also of one that could not be started and of one that ended while no
agent was there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lockstep_api.messages import Start, StepSummary, Term
from lockstep_trainer.agent.examine import examine
from lockstep_trainer.agent.output import Output
from lockstep_trainer.agent.process import UNKNOWN_EXIT, Exit, Watched, read_exit
from lockstep_trainer.agent.settings import Job, Settings
from lockstep_trainer.agent.zygote_client import ZygoteClient, ZygoteError, ZygoteGoneError
from lockstep_trainer.protocol.events import Event, WorkerEnded, WorkerReported, WorkersExamined, WorkersStepped
from lockstep_trainer.protocol.progress import StepFold
from lockstep_trainer.steprecord import STARTING, StepReader, StepRecordError
from lockstep_trainer.supervisor import write_json

log = logging.getLogger(__name__)

POLL_SECONDS = 0.03
"""Step records, output and reports are looked at so often."""
_SECTION_SECONDS = 0.25
"""A change of section alone is told at most so often."""
_COLLECTIVE = "collective"


class Worker:
    """One worker of one generation."""

    def __init__(self, folder: Path, term: Term, rank: int) -> None:
        self.folder = folder
        self.term = term
        self.rank = rank
        self.begun = time.time()
        self.process: Watched | None = None
        self.killed = False
        self.ended = False
        self.step = 0
        self.output = Output(folder, rank)
        self._reader: StepReader | None = None
        self._events_position = folder / "events.position"  # what was passed on: a new agent goes on there
        self._events = int(self._events_position.read_text()) if self._events_position.exists() else 0

    def kill(self) -> None:
        """Also where it is still being started."""
        self.killed = True
        if self.process:
            self.process.kill()

    def steps(self) -> list[StepSummary]:
        """New step records."""
        if self._reader is None:
            try:
                self._reader = StepReader(self.folder / "steps")
            except (FileNotFoundError, StepRecordError):
                return []
        records = self._reader.new_records()
        if records:
            self.step = records[-1].step
        return [
            StepSummary(
                r.step, r.at, r.seconds, r.loss, r.tokens, r.grad_norm, r.lr, r.sections, r.trained, r.mfu, r.memory
            )
            for r in records
        ]

    @property
    def section(self) -> str:
        """Where it is."""
        return self._reader.section if self._reader else STARTING

    def reports(self) -> list[dict[str, Any]]:
        """New lines of events.jsonl."""
        try:
            with (self.folder / "events.jsonl").open("rb") as file:
                file.seek(self._events)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        if not whole:
            return []
        self._events += len(whole) + 1
        self._events_position.write_text(str(self._events))
        return [json.loads(line) for line in whole.split(b"\n") if line.strip()]

    def error(self) -> tuple[str | None, bool]:
        """The sentence that it left, and whether it blames the user."""
        try:
            raw = json.loads((self.folder / "error.json").read_text())
        except (FileNotFoundError, ValueError):
            return None, False
        return raw.get("message"), bool(raw.get("user_error"))

    def close(self) -> None:
        """Let go of its files."""
        self.output.close()
        if self._reader:
            self._reader.close()
            self._reader = None


class Workers:
    """All of this node's workers of the running generation."""

    def __init__(
        self,
        settings: Settings,
        job: Job,
        zygote: ZygoteClient,
        tell: Callable[[Event], None],
        *,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """``look`` is called before a worker's end is told: what it has staged comes first."""
        self._settings = settings
        self._look = look
        self._job = job
        self._zygote = zygote
        self._tell = tell
        self._workers: dict[int, Worker] = {}
        self._fold = StepFold(1)
        self._start: Start | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._awake = asyncio.Event()
        self._section = STARTING
        self._section_at = 0.0

    def folder(self, term: Term, rank: int) -> Path:
        """Where this worker lives."""
        return self._settings.run_dir / "workers" / f"e{term.epoch}-g{term.generation}-r{rank}"

    def current(self, rank: int) -> Worker | None:
        """This node's worker of that rank, of the newest generation; it may have ended."""
        return self._workers.get(rank)

    def launch(self, start: Start, slot: int, *, before: asyncio.Task[None] | None = None) -> None:
        """Start the generation's workers, behind ``before``; returns at once."""
        self._remove_old(start.term)
        self._begin(start, slot)
        for local_rank, worker in enumerate(self._workers.values()):
            self._spawn(self._run(worker, start, slot, local_rank, before))

    def adopt(self, start: Start, slot: int) -> None:
        """Take over what an earlier agent started."""
        self._begin(start, slot)
        for worker in self._workers.values():
            self._spawn(self._take_over(worker))

    def kill(self, term: Term) -> None:
        """Kill all workers up to this generation."""
        for worker in self._workers.values():
            if worker.term <= term and not worker.ended:
                worker.kill()

    async def examine(self, term: Term) -> None:
        """Tell where the workers of this generation are: it makes no step any more."""
        asked = [worker for worker in self._workers.values() if worker.term == term]
        found = await asyncio.gather(*(examine(worker, listens=not self._job.command) for worker in asked))
        self._tell(WorkersExamined(term, tuple(found)))

    async def poll(self) -> None:
        """Listen to the workers; never returns."""
        while True:
            await self._awake.wait()
            self._listen()
            if not any(not worker.ended for worker in self._workers.values()):
                self._awake.clear()
            await asyncio.sleep(POLL_SECONDS)

    async def all_ended(self) -> None:
        """Wait for everything that was started."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---------------------------------------------------------------------------------------------

    def _begin(self, start: Start, slot: int) -> None:
        for worker in self._workers.values():
            worker.close()
        self._start = start
        self._fold = StepFold(start.gpus_per_node)
        self._section = STARTING
        first = slot * start.gpus_per_node
        ranks = range(first, first + start.gpus_per_node)
        self._workers = {rank: Worker(self.folder(start.term, rank), start.term, rank) for rank in ranks}
        self._awake.set()

    def _spawn(self, coroutine: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a worker's task failed", exc_info=error)

    async def _run(
        self, worker: Worker, start: Start, slot: int, local_rank: int, before: asyncio.Task[None] | None
    ) -> None:
        if before:
            await asyncio.wait({before})
        worker.folder.mkdir(parents=True, exist_ok=True)
        orders = self._orders(worker, start, slot, local_rank)
        write_json(worker.folder / "start.json", orders)
        request: dict[str, Any] = {"op": "fork", "folder": str(worker.folder)}
        if self._job.command:
            env = script_environment(start, worker.rank, local_rank, slot)
            request |= {"op": "exec", "argv": self._job.command, "env": env}
        while not worker.killed:
            try:
                await self._zygote.request(**request)
                break
            except ZygoteGoneError:
                if (worker.folder / "pid.json").exists():
                    break  # it had forked before it died
            except ZygoteError as error:
                self._end(worker, Exit(1, time.time()), f"could not be started: {error}")
                return
        await self._take_over(worker)

    async def _take_over(self, worker: Worker) -> None:
        exits = self._settings.run_dir / "exits"
        raw = _read_pid(worker.folder)
        if raw is None and not worker.killed:
            await self._zygote.ready()  # from now on nothing that an earlier agent asked for can come
            raw = _read_pid(worker.folder)
        if raw is None:
            self._end(worker, Exit(UNKNOWN_EXIT, time.time()), "was never started")
            return
        worker.begun = (worker.folder / "pid.json").stat().st_mtime
        worker.process = Watched.open(raw["pid"], raw["start"], worker.folder, exits)
        if worker.process is None:
            self._end(worker, await read_exit(worker.folder, exits, raw["pid"], worker.begun))
            return
        if worker.killed:
            worker.process.kill()
        self._end(worker, await worker.process.wait(worker.begun))

    def _end(self, worker: Worker, end: Exit, problem: str | None = None) -> None:
        """Its last words, then its end."""
        worker.ended = True
        if self._workers.get(worker.rank) is worker:
            self._listen()
        worker.output.forward(worker.step, final=True)
        message, user_error = worker.error()
        self._look()
        self._tell(
            WorkerEnded(
                term=worker.term,
                rank=worker.rank,
                exit_code=end.code,
                at=end.at,
                error=message or problem,
                user_error=user_error,
                log_tail=tuple(worker.output.last),
            )
        )

    def _listen(self) -> None:
        """Everything that the workers have written since the last time."""
        if self._start is None:
            return
        term = self._start.term
        done: list[StepSummary] = []
        for worker in self._workers.values():
            done += self._fold.add(worker.rank, worker.steps())
            worker.output.forward(worker.step)
        slowest = min(self._workers.values(), key=lambda worker: (worker.step, worker.section == _COLLECTIVE))
        section, now = slowest.section, time.monotonic()
        if done or (section != self._section and now - self._section_at >= _SECTION_SECONDS):
            self._section, self._section_at = section, now
            self._tell(WorkersStepped(term, tuple(done), section))
        if 0 in self._workers:
            for line in self._workers[0].reports():
                self._tell(WorkerReported(line))

    def _orders(self, worker: Worker, start: Start, slot: int, local_rank: int) -> dict[str, Any]:
        restore = start.restore
        return {
            "job": str(self._settings.config_dir / "job.json"),
            "job_uid": start.job_uid,
            "epoch": start.term.epoch,
            "generation": start.term.generation,
            "rank": worker.rank,
            "local_rank": local_rank,
            "node_rank": slot,
            "world_size": start.nodes * start.gpus_per_node,
            "local_world_size": start.gpus_per_node,
            "rendezvous": {
                "host": start.rendezvous.host,
                "port": start.rendezvous.port,
                "prefix": start.rendezvous.prefix,
            },
            "restore": restore and asdict(restore),
            "memory": start.memory and {"state": asdict(start.memory.state)},
            "data_dir": str(self._settings.data_dir),
        }

    def _remove_old(self, term: Term) -> None:
        """Folders of generations before the last one: they are in memory, and their last words were passed on."""
        with suppress(FileNotFoundError):
            for entry in os.scandir(self._settings.run_dir / "workers"):
                epoch, generation = _parse_folder(entry.name)
                if (epoch, generation) < (term.epoch, term.generation - 1):
                    shutil.rmtree(entry.path, ignore_errors=True)


def script_environment(start: Start, rank: int, local_rank: int, slot: int) -> dict[str, str]:
    """What torchrun would set for a user's script."""
    host, port = start.rendezvous.host, str(start.rendezvous.port)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(start.nodes * start.gpus_per_node),
        "LOCAL_WORLD_SIZE": str(start.gpus_per_node),
        "GROUP_RANK": str(slot),
        "NODE_RANK": str(slot),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": str(start.term.generation - 1),
        "TORCHELASTIC_RUN_ID": f"{start.job_uid}/{start.rendezvous.prefix}",
        "PET_NNODES": str(start.nodes),
        "PET_NPROC_PER_NODE": str(start.gpus_per_node),
        "PET_NODE_RANK": str(slot),
        "PET_MASTER_ADDR": host,
        "PET_MASTER_PORT": port,
        "PYTHONUNBUFFERED": "1",
    }


def _read_pid(folder: Path) -> dict[str, Any] | None:
    try:
        raw: dict[str, Any] = json.loads((folder / "pid.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return raw


def _parse_folder(name: str) -> tuple[int, int]:
    """(epoch, generation) of e3-g2-r5; what is no such name sorts last."""
    parts = name.split("-")
    try:
        return int(parts[0][1:]), int(parts[1][1:])
    except (IndexError, ValueError):
        return (1 << 62, 0)
