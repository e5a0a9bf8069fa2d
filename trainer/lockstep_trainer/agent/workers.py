"""This node's worker processes: started through the zygote, watched, listened to, told to leave, killed.

The core hears of each worker's end exactly once, also of one that could not be started and of one that ended while no
agent was there; and of each that has left its generation and waits for the next one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lockstep_api.messages import RankWork, Start, StepSummary, Term
from lockstep_api.tails import tail
from lockstep_trainer.agent.examine import examine
from lockstep_trainer.agent.orders import script_environment, worker_orders
from lockstep_trainer.agent.process import UNKNOWN_EXIT, Exit, Watched, read_exit
from lockstep_trainer.agent.settings import Job, Settings
from lockstep_trainer.agent.worker import Worker
from lockstep_trainer.agent.zygote_client import ZygoteClient, ZygoteError, ZygoteGoneError
from lockstep_trainer.protocol.events import (
    Event,
    WorkerEnded,
    WorkerIdle,
    WorkerReported,
    WorkersExamined,
    WorkersStepped,
)
from lockstep_trainer.protocol.progress import BEFORE_MEETING, MEETING, StepFold
from lockstep_trainer.steprecord import STARTING
from lockstep_trainer.supervisor import write_json

log = logging.getLogger(__name__)

POLL_SECONDS = 0.03
"""Step records, output and reports are looked at so often."""
_SECTION_SECONDS = 0.25
"""A change of section alone is told at most so often."""
_COLLECTIVE = "collective"
_FIRST = {section: number for number, section in enumerate((*BEFORE_MEETING, MEETING))}


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
        self._strays: set[asyncio.Task[None]] = set()
        self._awake = asyncio.Event()
        self._work: list[RankWork] = []
        self._section = STARTING
        self._section_at = 0.0

    def folder(self, term: Term, rank: int) -> Path:
        """Where this worker lives."""
        return self._settings.run_dir / "workers" / f"e{term.epoch}-g{term.generation}-r{rank}"

    def current(self, rank: int) -> Worker | None:
        """This node's worker of that rank, of the newest generation; it may have ended."""
        return self._workers.get(rank)

    def launch(self, start: Start, slot: int, *, before: asyncio.Task[None] | None = None) -> None:
        """Start the generation's workers, in idle processes where there are some and the order does not ask for fresh
        ones, behind ``before``; returns at once."""
        waiting = [before] if before else []
        resting: dict[int, Worker] = {}
        for worker in self._workers.values():
            if worker.ended:
                continue
            if worker.idle and not worker.killed and not start.fresh:
                resting[worker.rank % start.gpus_per_node] = worker
            else:
                worker.kill()
                waiting += [worker.task] if worker.task else []
        self._remove_old(start.term)
        self._begin(start, slot)
        for local_rank, worker in enumerate(self._workers.values()):
            worker.task = self._spawn(
                self._run(worker, start, slot, resting.get(local_rank), [*waiting, *self._strays])
            )

    def adopt(self, start: Start, slot: int) -> None:
        """Take over what an earlier agent started."""
        self._begin(start, slot)
        for worker in self._workers.values():
            worker.task = self._spawn(self._take_over(worker))

    def end_strays(self) -> None:
        """Kill what an earlier agent left idle between two generations: there is no telling what it was told. Behind
        ``adopt``, where something is to be adopted."""
        exits = self._settings.run_dir / "exits"
        adopted = {(_read_pid(worker.folder) or {}).get("pid") for worker in self._workers.values()}
        for file in (self._settings.run_dir / "workers").glob("*/pid.json"):
            raw = _read_pid(file.parent)
            if raw is None or raw["pid"] in adopted or (file.parent / "exit.json").exists():
                continue
            process = Watched.open(raw["pid"], raw["start"], Path(raw.get("home", file.parent)), exits)
            if process is not None:
                process.kill()
                task = self._spawn(_until_gone(process, file.stat().st_mtime))
                self._strays.add(task)
                task.add_done_callback(self._strays.discard)

    def leave(self, term: Term) -> None:
        """Have all workers up to this generation leave it; called again until they are idle or have ended."""
        for worker in self._workers.values():
            if worker.term <= term and not worker.ended:
                worker.leave()

    def kill(self, term: Term) -> None:
        """Kill all workers up to this generation, idle ones too."""
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
            if not any(not worker.ended or worker.output.waiting for worker in self._workers.values()):
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
        self._work.clear()
        self._section = STARTING
        first = slot * start.gpus_per_node
        ranks = range(first, first + start.gpus_per_node)
        self._workers = {rank: Worker(self.folder(start.term, rank), start.term, rank) for rank in ranks}
        self._awake.set()

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a worker's task failed", exc_info=error)

    async def _run(
        self,
        worker: Worker,
        start: Start,
        slot: int,
        resting: Worker | None,
        before: Sequence[asyncio.Task[None]],
    ) -> None:
        if before:
            await asyncio.wait(before)
        if resting and worker.killed:  # the generation is over before it began, and nobody else has the idle process
            resting.kill()
            if resting.task:
                await asyncio.wait([resting.task])
        local_rank = worker.rank % start.gpus_per_node
        worker.folder.mkdir(parents=True, exist_ok=True)
        orders = worker_orders(self._settings, start, rank=worker.rank, local_rank=local_rank, slot=slot)
        write_json(worker.folder / "start.json", orders)
        if resting and resting.process and not resting.process.gone:
            worker.go_on(resting)
            if resting.task:
                resting.task.cancel()
            del resting, before, start  # what waits for the process would keep all generations that it was in
            self._end(worker, await worker.process.wait(worker.begun))  # type: ignore[union-attr]
            return
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
        worker.home = Path(raw.get("home", worker.folder))
        worker.process = Watched.open(raw["pid"], raw["start"], worker.home, exits)
        if worker.process is None:
            self._end(worker, await read_exit(worker.home, exits, raw["pid"], worker.begun))
            return
        if worker.killed:
            worker.process.kill()
        elif "from" in raw and not worker.joined:  # the agent that wanted it died before it said so, or just behind
            worker.send_to(Path(raw["from"]))
        self._end(worker, await worker.process.wait(worker.begun))

    def _end(self, worker: Worker, end: Exit, problem: str | None = None) -> None:
        """Its last words, then its end."""
        worker.ended = True
        current = self._workers.get(worker.rank) is worker
        if current:
            self._listen()
        worker.output.forward(worker.step, final=True)
        if not current:  # nobody listens to it any more
            worker.close()
        message, user_error = worker.error()
        self._look()
        last = worker.output.last
        self._tell(
            WorkerEnded(
                term=worker.term,
                rank=worker.rank,
                exit_code=end.code,
                at=end.at,
                error=message or problem,
                user_error=user_error,
                log_tail=tuple(last if self._job.searches_output else tail(last)),
                ours=worker.process is None or worker.process.killed,
            )
        )

    def _listen(self) -> None:
        """Everything that the workers have written since the last time."""
        if self._start is None:
            return
        term = self._start.term
        left = self._left()  # asked first: what they made before they left is read by now
        done: list[StepSummary] = []
        for worker in self._workers.values():
            done += self._fold.add(worker.rank, worker.steps())
            self._work += worker.work()
            worker.output.forward(worker.step)
        section, now = min(self._workers.values(), key=_place).section, time.monotonic()
        if done or (section != self._section and now - self._section_at >= _SECTION_SECONDS):
            self._section, self._section_at = section, now
            self._tell(WorkersStepped(term, tuple(done), section, tuple(self._work)))
            self._work.clear()
        if 0 in self._workers:
            for line in self._workers[0].reports():
                self._tell(WorkerReported(line))
        for worker, words in left:
            worker.idle = True
            self._look()
            self._tell(WorkerIdle(term, worker.rank, float(words.get("at", 0.0)), words.get("error")))

    def _left(self) -> list[tuple[Worker, dict[str, Any]]]:
        """Workers that have left the generation since the last time, and what they said."""
        working = [worker for worker in self._workers.values() if not worker.idle and not worker.ended]
        return [(worker, words) for worker in working if (words := worker.left()) is not None]

    def _remove_old(self, term: Term) -> None:
        """Folders of generations before the last one: they are in memory, and their last words were passed on. Where a
        process rests or began that still lives, there is more to come."""
        needed = {folder.name for worker in self._workers.values() for folder in (worker.folder, worker.home)}
        with suppress(FileNotFoundError):
            for entry in os.scandir(self._settings.run_dir / "workers"):
                epoch, generation = _parse_folder(entry.name)
                if (epoch, generation) < (term.epoch, term.generation - 1) and entry.name not in needed:
                    shutil.rmtree(entry.path, ignore_errors=True)


def _place(worker: Worker) -> tuple[int, int, bool]:
    """Workers in the order in which they keep the others waiting, whoever does so most first."""
    return worker.step, _FIRST.get(worker.section, len(_FIRST)), worker.section == _COLLECTIVE


def _read_pid(folder: Path) -> dict[str, Any] | None:
    try:
        raw: dict[str, Any] = json.loads((folder / "pid.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return raw


async def _until_gone(process: Watched, since: float) -> None:
    await process.wait(since)


def _parse_folder(name: str) -> tuple[int, int]:
    """(epoch, generation) of e3-g2-r5; what is no such name sorts last."""
    parts = name.split("-")
    try:
        return int(parts[0][1:]), int(parts[1][1:])
    except (IndexError, ValueError):
        return (1 << 62, 0)
