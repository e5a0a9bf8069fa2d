"""How long the host of a rank stood still: its main thread collected garbage, or wanted a CPU and got none.

Both are told without asking anybody. Python calls back around each collection. The kernel counts for each thread how
long it was ready to run and did not: ``/proc/…/schedstat``, second number, nanoseconds (Documentation/scheduler/
sched-stats.rst). That is so when others have the CPUs, and when a quota of the control group is used up (tried on Linux
6.18: a loop at 30 % of a CPU got 0.29 s in a second, and the count said 0.71 s). A kernel without it tells 0.

Which of the two it was, ``cpu.stat`` of the control group says. It adds up over the CPUs and processes of a container,
so that it is no measure of one thread; it only explains.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Stood:
    """Seconds in a step."""

    seconds: float
    """That the main thread stood still."""
    garbage: float
    """Of these, for collecting garbage."""
    throttled: float
    """That the control group's quota held its processes up, over all of its CPUs."""


class HostPauses:
    """Of the thread that begins it, until it is closed; 0 before."""

    def __init__(self) -> None:
        self._files: list[int] = []
        self._delay = self._throttled = _nothing
        self._garbage = 0.0
        self._collecting: float | None = None
        self._hidden = 0.0
        self._told = self._now()

    def begin(self, delay: Callable[[], float] | None = None, throttled: Callable[[], float] | None = None) -> None:
        """Args: ``delay``, seconds until now that this thread waited for a CPU; ``throttled``, what the quota held up;
        None: as this machine tells them."""
        self._delay = delay or self._open_schedstat()
        self._throttled = throttled or self._open_quota(Path("/"))
        self._told = self._now()
        gc.callbacks.append(self._collection)

    def close(self) -> None:
        """Nothing is told any more."""
        if self._collection in gc.callbacks:
            gc.callbacks.remove(self._collection)
        self._delay = self._throttled = _nothing
        while self._files:
            os.close(self._files.pop())

    def seconds(self) -> float:
        """That the thread stood still, ever."""
        return self._garbage + self._delay()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """A device has enough to do in the body: nothing waits for the host, so that it counts nothing."""
        begun = self.seconds()
        yield
        self._hidden += self.seconds() - begun

    def take(self) -> Stood:
        """Since the last call."""
        before, self._told = self._told, self._now()
        return Stood(*(max(now - then, 0.0) for now, then in zip(self._told, before, strict=True)))

    def _now(self) -> tuple[float, float, float]:
        return self.seconds() - self._hidden, self._garbage, self._throttled()

    def _collection(self, phase: str, _: dict[str, Any]) -> None:
        running = time.perf_counter() - self._delay()  # what it waits for a CPU meanwhile is counted already
        if phase == "start":
            self._collecting = running
        elif self._collecting is not None:
            self._garbage += max(running - self._collecting, 0.0)
            self._collecting = None

    def _open_schedstat(self) -> Callable[[], float]:
        try:
            file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return _nothing
        self._files.append(file)
        return lambda: int(os.pread(file, 96, 0).split()[1]) / 1e9

    def _open_quota(self, root: Path) -> Callable[[], float]:
        path = quota_file(root)
        if path is None:
            return _nothing
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._files.append(file)
        return lambda: throttled_seconds(os.pread(file, 4096, 0).decode())


def _nothing() -> float:
    return 0.0


def quota_file(root: Path) -> Path | None:
    """``cpu.stat`` of this process's control group, of version 2 or 1; None where none can be read. ``root``: where
    ``proc`` and ``sys`` are."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        # in a container the path may be the host's, and what is mounted the container's own
        for folder in (mount / path.lstrip("/"), mount):
            try:
                if "throttled_" in (folder / "cpu.stat").read_text():
                    return folder / "cpu.stat"
            except OSError:
                continue
    return None


def throttled_seconds(text: str) -> float:
    """What a ``cpu.stat`` says: in microseconds in version 2 of control groups, in nanoseconds in version 1."""
    numbers = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
    if "throttled_usec" in numbers:
        return int(numbers["throttled_usec"]) / 1e6
    return int(numbers.get("throttled_time", 0)) / 1e9
