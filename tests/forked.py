"""Runs code on several ranks in a test: forks them from this process, which must not have started threads.

What a rank raises fails the test, with its traceback. ``run_ranks`` gives the ranks a process group; ``run_workers``
starts whole workers.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep_trainer.preload import preload

preload()  # once here, and not in every forked process



def run_ranks(ranks: int, body: Callable[[int], None], *, timeout: float = 60.0) -> None:
    """Run ``body(rank)`` on each of ``ranks`` forked processes that share a gloo group; fails where one does."""
    store = host_store()

    def rank_main(rank: int) -> None:
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", store=client, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
        torch.set_num_threads(1)
        body(rank)

    codes = fork_all([lambda rank=rank: rank_main(rank) for rank in range(ranks)])  # type: ignore[misc]
    assert codes == [0] * ranks, f"exit codes by rank: {codes}"


def run_workers(folders: list[Path]) -> list[int]:
    """Start a worker for each folder, whose ``start.json`` is written; returns their exit codes."""
    from lockstep_trainer.worker import main

    return fork_all([lambda folder=folder: main(folder) for folder in folders], logs=folders)  # type: ignore[misc]


def worker_folders(root: Path, job: Path, *, ranks: int, port: int, **orders: Any) -> list[Path]:
    """Folders with the orders of one generation's workers, all in one pod; ``orders`` change ``start.json``."""
    folders = []
    epoch, generation = orders.get("epoch", 1), orders.get("generation", 1)
    for rank in range(ranks):
        folder = root / "workers" / f"e{epoch}-g{generation}-r{rank}"
        folder.mkdir(parents=True)
        start = {
            "job": str(job),
            "job_uid": "uid",
            "epoch": epoch,
            "generation": generation,
            "rank": rank,
            "local_rank": rank,
            "node_rank": 0,
            "world_size": ranks,
            "local_world_size": ranks,
            "rendezvous": {"host": "127.0.0.1", "port": port, "prefix": f"{epoch}/{generation}"},
            "restore": None,
            "data_dir": str(root / "data"),
        }
        (folder / "start.json").write_text(json.dumps({**start, **orders}))
        folders.append(folder)
    return folders


def fork_all(bodies: list[Callable[[], None]], logs: list[Path] | None = None) -> list[int]:
    """Run each body in a forked process and return the exit codes; minus the signal where one was killed."""
    pids = []
    for number, body in enumerate(bodies):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if logs is not None:
                    handle = os.open(logs[number] / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                    os.dup2(handle, 1)
                    os.dup2(handle, 2)
                body()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def host_store() -> dist.TCPStore:
    """A rendezvous store in this process; its ``port`` is free for others to reach."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
