"""One worker of one generation, as its agent sees it: its files, its process, and how it is told to go."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from lockstep_api.messages import RankWork, StepSummary, Term
from lockstep_trainer.agent.output import Output
from lockstep_trainer.agent.process import Watched
from lockstep_trainer.control import CONTROL, CONTROL_SIGNAL, IDLE
from lockstep_trainer.position import STACKS
from lockstep_trainer.steprecord import STARTING, OwnStep, StepReader, StepRecordError
from lockstep_trainer.supervisor import read_json, write_json, write_whole

LEAVE_SECONDS = 5.0
"""A worker that was told to leave its generation and has not come out for so long is killed. It takes tens of
milliseconds; longer where a tracker ends its run, or a large snapshot is being copied."""


class Worker:
    """One worker of one generation."""

    def __init__(self, folder: Path, term: Term, rank: int) -> None:
        self.folder = folder
        self.home = folder
        """Where the process began, maybe as a worker of an older generation: its exit code will be there."""
        self.term = term
        self.rank = rank
        self.begun = time.time()
        self.process: Watched | None = None
        self.task: asyncio.Task[None] | None = None
        """Waits for its end."""
        self.killed = False
        self.ended = False
        self.idle = False
        """It is out of its generation, and waits to be told to go on or to end."""
        self._told_to_leave: float | None = None
        self.step = 0
        self.output = Output(folder, rank)
        self._reader: StepReader | None = None
        self._work: list[RankWork] = []
        self._events_position = folder / "events.position"  # what was passed on: a new agent goes on there
        self._events = self._read_events_position()

    def kill(self) -> None:
        """Also where it is still being started."""
        self.killed = True
        if self.process:
            self.process.kill()

    def leave(self) -> None:
        """Have it leave its generation; kill it where it can't, or does not in time. Called again and again."""
        if self.killed or self.idle:
            return
        now = time.monotonic()
        if self._told_to_leave is None and self.process and self.joined and not self.process.stopped:
            self._told_to_leave = now
            write_json(self.folder / CONTROL, {"leave": True})
            self.process.signal(CONTROL_SIGNAL)
        elif self._told_to_leave is None or now - self._told_to_leave > LEAVE_SECONDS:
            self.kill()

    def left(self) -> dict[str, Any] | None:
        """What it says once it is out: ``at``, and ``error`` where it lost a peer. None before that."""
        return read_json(self.folder / IDLE)

    def go_on(self, before: Worker) -> None:
        """Take over the process of ``before``, which is idle, and let it join this worker's generation. ``start.json``
        is written."""
        os.link(before.folder / "output.log", self.folder / "output.log")
        self.output.close()
        self.output = before.output
        self.output.move(self.folder)
        self.home, self.process, before.process = before.home, before.process, None
        assert self.process is not None
        raw = {"pid": self.process.pid, "start": self.process.started, "home": str(self.home)}
        write_json(self.folder / "pid.json", {**raw, "from": str(before.folder)})
        (before.folder / "pid.json").unlink(missing_ok=True)
        self.send_to(before.folder)

    def send_to(self, before: Path) -> None:
        """Tell the process, which rests in the folder ``before``, that it has this one now. A second time does no
        harm."""
        assert self.process is not None
        write_json(before / CONTROL, {"join": str(self.folder)})
        self.process.signal(CONTROL_SIGNAL)

    @property
    def joined(self) -> bool:
        """The process has come to this folder, and listens."""
        return (self.folder / STACKS).exists()

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
        self._work += [_work(self.rank, r.step, r.sections.get("load", 0.0), r.own) for r in records if r.own]
        return [
            StepSummary(
                r.step, r.at, r.seconds, r.loss, r.tokens, r.grad_norm, r.lr, r.sections, r.trained, r.mfu, r.memory
            )
            for r in records
        ]

    def work(self) -> list[RankWork]:
        """Its own work in the steps whose records were new since the last call."""
        work, self._work = self._work, []
        return work

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
        write_whole(self._events_position, str(self._events).encode())
        return [json.loads(line) for line in whole.split(b"\n") if line.strip()]

    def _read_events_position(self) -> int:
        try:
            return int(self._events_position.read_text())
        except (FileNotFoundError, ValueError):
            return 0

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


def _work(rank: int, step: int, data: float, own: OwnStep) -> RankWork:
    """What goes to the leader each step of each rank: no more digits than a clock has."""
    return RankWork(
        rank,
        step,
        compute=_short(own.compute),
        data=_short(data),
        tokens=own.tokens,
        squares=own.squares,
        product=None if own.product is None else _short(own.product),
        copy=None if own.copy is None else _short(own.copy),
        host=_short(own.host),
        garbage=_short(own.garbage),
        throttled=_short(own.throttled),
        waited={name: _short(seconds) for name, seconds in own.waited.items()},
        peer=own.peer,
        link=None if own.link is None else _short(own.link),
        clock=own.clock,
    )


def _short(seconds: float) -> float:
    """To a tenth of a microsecond."""
    return round(seconds, 7)
