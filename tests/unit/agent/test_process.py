"""A worker's process, as its agent holds it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep_trainer.agent import process
from lockstep_trainer.agent.process import UNKNOWN_EXIT, Watched


def _sleeping() -> int:
    return os.posix_spawnp("sleep", ["sleep", "60"], os.environ, setpgroup=0)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("by_others", [False, True])
def test_it_is_known_whether_another_signal_came_first(tmp_path: Path, by_others: bool) -> None:
    """A fault's root is whoever was killed by something else: the agent kills the others because of it."""

    async def run() -> None:
        pid = _sleeping()
        watched = Watched.open(pid, None, tmp_path, tmp_path)
        assert watched is not None
        if by_others:
            os.kill(pid, signal.SIGKILL)
            _until(lambda: watched.stopped)  # it is not reaped yet, and the loop has not seen its end
        watched.kill()
        watched.kill()
        assert watched.killed is not by_others
        os.waitpid(pid, 0)

    asyncio.run(run())


def test_where_nobody_kept_how_it_ended_it_is_over_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not since it was begun: the time until then was no time in which the fault was not seen."""
    monkeypatch.setattr(process, "_EXIT_FILE_SECONDS", 0.0)

    async def run() -> None:
        pid = _sleeping()
        watched = Watched.open(pid, None, tmp_path, tmp_path)
        assert watched is not None
        os.kill(pid, signal.SIGKILL)
        before = time.time()
        end = await watched.wait(before - 1000.0)
        assert end.code == UNKNOWN_EXIT
        assert before <= end.at <= time.time()
        os.waitpid(pid, 0)

    asyncio.run(run())
