"""Traces and memory snapshots of a running worker, asked for by its agent (``lockstep profile``).

In the worker's folder::

    profile/request.json        {id, steps, trace, memory}, written by the agent
    profile/<id>/status.json    {state, message, first_step, last_step, files: [{name, bytes}]}, written here
    profile/<id>/<file>         trace-r0.json.gz (Chrome's trace format), memory-r0.pickle (torch's snapshot)

Between two steps the worker looks for a request: one ``stat`` of a file in memory. What goes wrong ends the profile and
never the worker.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from lockstep_trainer.sections import Sections
from lockstep_trainer.supervisor import write_json

log = logging.getLogger(__name__)

_MEMORY_EVENTS = 1_000_000
"""Allocations whose stacks a memory snapshot keeps at most."""


@dataclass
class _Running:
    """A profile under way: a step to warm up, whose times are not kept, then the steps that were asked for."""

    folder: Path
    steps: int
    begun: int  # steps done at its start
    tracer: profile | None = None
    memory: bool = False
    files: list[str] = field(default_factory=list)

    @property
    def first(self) -> int:
        return self.begun + 2

    @property
    def last(self) -> int:
        return self.begun + 1 + self.steps


class Profiler:
    """The worker's end."""

    def __init__(self, folder: Path, rank: int, device: torch.device, sections: Sections) -> None:
        self._folder = folder / "profile"
        self._request = os.fspath(self._folder / "request.json")
        self._rank, self._device, self._sections = rank, device, sections
        self._seen = 0  # request.json's time of change
        self._running: _Running | None = None
        self._writing: threading.Thread | None = None

    def step(self, done: int) -> None:
        """Between two steps, of which ``done`` are behind."""
        if self._running is None:
            try:
                changed = os.stat(self._request).st_mtime_ns  # a Path would double its cost
            except OSError:
                return
            if changed == self._seen:
                return
            self._seen = changed
        try:
            self._advance(done)
        except Exception as error:
            log.exception("the profile failed; training goes on")
            self._fail(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Let a trace be written to its end; one that is under way is given up."""
        if self._running:
            self._fail("training ended before the steps that were asked for were done")
        if self._writing:
            self._writing.join()

    # ------------------------------------------------------------------------------------------------------------

    def _advance(self, done: int) -> None:
        running = self._running
        if running is None:
            self._begin(done)
            return
        if running.tracer:
            running.tracer.step()
        if done == running.first - 1 and running.memory:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        if done == running.last:
            self._finish(running)

    def _begin(self, done: int) -> None:
        request: dict[str, Any] = json.loads(Path(self._request).read_text())
        folder = self._folder / str(request["id"])
        running = self._running = _Running(folder, int(request["steps"]), done, memory=bool(request["memory"]))
        if running.memory and self._device.type != "cuda":
            self._fail(
                f"a memory snapshot is of CUDA's allocator, and rank {self._rank} runs on {self._device.type}; "
                "leave out --memory"
            )
            return
        if request["trace"]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
            running.tracer = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=1, active=running.steps, repeat=1),
                record_shapes=True,
            )
            running.tracer.start()
            self._sections.annotate = record_function
        self._say("running")
        log.info("profiling steps %d to %d", running.first, running.last)

    def _finish(self, running: _Running) -> None:
        self._sections.annotate = None
        if running.tracer:
            running.tracer.stop()
        if running.memory:
            name = f"memory-r{self._rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(running.folder / name))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
            running.files.append(name)
        self._say("writing")
        self._running = None
        if self._writing:
            self._writing.join()
        self._writing = threading.Thread(target=self._write, args=(running,), name="trace", daemon=True)
        self._writing.start()

    def _write(self, running: _Running) -> None:
        """Beside training: a trace of many operations takes seconds to write."""
        try:
            if running.tracer:
                name = f"trace-r{self._rank}.json.gz"
                running.tracer.export_chrome_trace(str(running.folder / name))
                running.files.append(name)
        except Exception as error:
            log.exception("the trace can't be written; training goes on")
            _say(running, "failed", f"the trace can't be written: {error}")
        else:
            _say(running, "done")

    def _fail(self, message: str) -> None:
        running, self._running = self._running, None
        self._sections.annotate = None
        if running is None:
            return
        if running.tracer:
            with suppress(Exception):
                running.tracer.stop()
        if running.memory and self._device.type == "cuda":
            with suppress(Exception):
                torch.cuda.memory._record_memory_history(enabled=None)
        _say(running, "failed", message)

    def _say(self, state: str) -> None:
        if self._running:
            _say(self._running, state)


def _say(running: _Running, state: str, message: str = "") -> None:
    """Tell the agent. The folder is gone where nobody waits any more."""
    files = [{"name": name, "bytes": (running.folder / name).stat().st_size} for name in running.files]
    with suppress(FileNotFoundError):
        write_json(
            running.folder / "status.json",
            {
                "state": state,
                "message": message,
                "first_step": running.first,
                "last_step": running.last,
                "files": files,
            },
        )
