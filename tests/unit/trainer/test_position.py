"""What a worker says of where it is, while its main thread is stuck in a collective that another rank never joins."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forked import meet, rendezvous_store, start_all, wait_all
from lockstep_trainer.position import POSITION, POSITION_SIGNAL, STACKS, STACKS_SIGNAL, Answers


def ask(folder: Path, pid: int) -> dict[str, Any]:
    """As the agent does."""
    path = folder / POSITION
    path.unlink(missing_ok=True)
    os.kill(pid, STACKS_SIGNAL)
    os.kill(pid, POSITION_SIGNAL)
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, "no answer"
        time.sleep(0.01)
    answer: dict[str, Any] = json.loads(path.read_text())
    return answer


def test_counts_of_both_ranks_show_who_never_came(tmp_path: Path) -> None:
    def run(rank: int, port: int) -> None:
        folder = tmp_path / f"r{rank}"
        folder.mkdir()
        Answers(folder)  # before there is a thread
        meet(rank, 2, port)
        rows = dist.new_group([0, 1], group_desc="rows")
        dist.all_reduce(torch.ones(2), group=rows)
        (folder / "new").write_text(str(os.getpid()))
        (folder / "new").rename(folder / "pid")
        if rank == 0:
            dist.all_reduce(torch.ones(2), group=rows)
            return
        while not (tmp_path / "r0" / "pid").exists():
            time.sleep(0.01)
        waiting = int((tmp_path / "r0" / "pid").read_text())
        deadline = time.monotonic() + 30
        while True:  # a moment until rank 0 is in there, and until the recorder knows that the first one has ended
            theirs, own = ask(tmp_path / "r0", waiting), ask(folder, os.getpid())
            counts = [
                next((each["entered"], each["done"]) for each in said["groups"] if each["group"].startswith("rows "))
                for said in (theirs, own)
            ]
            if theirs["communicating"] and counts == [(2, 1), (1, 1)]:
                break
            assert time.monotonic() < deadline, (counts, theirs)
        dist.all_reduce(torch.ones(2), group=rows)
        assert {each["group"] for each in theirs["groups"]} == {each["group"] for each in own["groups"]}
        assert not own["communicating"]
        assert any("test_position.py" in frame and " run" in frame for frame in own["frames"])
        assert "test_position.py" in (tmp_path / "r0" / STACKS).read_text()

    with rendezvous_store() as port:
        assert wait_all(start_all([partial(run, rank, port) for rank in range(2)])) == [0, 0]


def test_a_question_before_there_is_a_group_ends_nobody(tmp_path: Path) -> None:
    def run() -> None:
        Answers(tmp_path)
        (tmp_path / "listens").touch()
        while True:
            signal.pause()  # ends with each signal

    (pid,) = start_all([run])
    try:
        while not (tmp_path / "listens").exists():
            time.sleep(0.01)
        assert ask(tmp_path, pid)["groups"] == []
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_all([pid])
