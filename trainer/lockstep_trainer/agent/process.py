"""Processes that are not our children: seen to end within milliseconds, killed without hitting a stranger."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lockstep_trainer.supervisor import stat_of
from lockstep_trainer.zygote import start_time

UNKNOWN_EXIT = -9
"""What a process counts as that left no exit code: it was killed together with whoever would have kept it."""
_EXIT_FILE_SECONDS = 2.0
_EXIT_POLL_SECONDS = 0.002
_PF_EXITING = 0x4
"""Of the kernel's include/linux/sched.h: it ends, which may take seconds where a GPU is to be let go of."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended."""

    code: int  # minus the signal
    at: float  # Unix seconds


class Watched:
    """A process held by its pidfd, so that its number can't come to mean another one."""

    def __init__(self, pid: int, started: int | None, descriptor: int, folder: Path, exits: Path) -> None:
        self.pid = pid
        self.started = started
        self._descriptor = descriptor
        self._folder = folder
        self._exits = exits
        self.killed = False
        """Whether it was still alive when it was first killed here: another signal may have ended it before."""
        self._gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, self._on_gone)

    @classmethod
    def open(cls, pid: int, started: int | None, folder: Path, exits: Path) -> Watched | None:
        """None where the process has ended. ``started`` tells it from a later one with the same number."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        if started is not None and start_time(pid) not in (started, None):
            os.close(descriptor)
            return None
        return cls(pid, started, descriptor, folder, exits)

    def _on_gone(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._gone.set()

    @property
    def gone(self) -> bool:
        """It has ended."""
        return self._gone.is_set()

    @property
    def stopped(self) -> bool:
        """It does nothing until it is sent SIGCONT, or is gone."""
        return self._state()[0] in "TtZX"

    def _state(self) -> tuple[str, int]:
        """Its state and flags."""
        try:
            fields = stat_of(self.pid)
        except OSError:
            return "X", _PF_EXITING
        return fields[0], int(fields[6])

    def kill(self) -> None:
        """Kill it and the processes of its group."""
        if self.gone:
            return
        self.killed = self.killed or not self._state()[1] & _PF_EXITING
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if not self.gone:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    async def wait(self, since: float) -> Exit:
        """Its end. The code is in a file that zygote or supervisor write when they reap it, an instant later."""
        await self._gone.wait()
        return await read_exit(self._folder, self._exits, self.pid, since)


async def read_exit(folder: Path, exits: Path, pid: int, since: float) -> Exit:
    """The exit that was kept for this process, started at ``since`` (Unix seconds), which is gone by now. Where nobody
    has kept any, how it ended is not known, and it was now."""
    now = time.time()
    deadline = asyncio.get_running_loop().time() + _EXIT_FILE_SECONDS
    while True:
        for path in (folder / "exit.json", exits / f"{pid}.json"):
            found = _parse_exit(path, pid)
            if found and found.at >= since - 1:
                return found
        if asyncio.get_running_loop().time() > deadline:
            return Exit(UNKNOWN_EXIT, now)
        await asyncio.sleep(_EXIT_POLL_SECONDS)


def _parse_exit(path: Path, pid: int) -> Exit | None:
    try:
        raw = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return Exit(raw["code"], raw["at"]) if raw["pid"] == pid else None
