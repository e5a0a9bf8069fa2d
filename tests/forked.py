"""Runs code on several ranks in a test: forks them from this process, which must not have started threads.

What a rank raises fails the test, with its traceback. ``run_ranks`` gives the ranks a process group; ``run_workers``
starts whole workers.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep_trainer.preload import preload
from lockstep_trainer.supervisor import die_with_parent
from lockstep_trainer.worker import main

preload()  # once here, and not in every forked process
torch.set_num_threads(1)  # a process with threads must not fork


def run_ranks(ranks: int, body: Callable[[int], None], *, timeout: float = 60.0) -> None:
    """Run ``body(rank)`` on each of ``ranks`` forked processes that share a gloo group; fails where one does."""

    def rank_main(rank: int, port: int) -> None:
        meet(rank, ranks, port, timeout=timeout)
        body(rank)

    with rendezvous_store() as port:
        codes = wait_all(start_all([partial(rank_main, rank, port) for rank in range(ranks)]))
    assert codes == [0] * ranks, f"exit codes by rank: {codes}"


def one_after_the_other(bodies: dict[str, Callable[[int], None]]) -> Callable[[int], None]:
    """For ``run_ranks``: all bodies in the same processes, whose start would take longer than a body."""

    def body(rank: int) -> None:
        for name, run in bodies.items():
            print(name, flush=True)
            run(rank)

    return body


def meet(rank: int, ranks: int, port: int, *, timeout: float = 60.0) -> None:
    """Join the process group of ``ranks``, in one of them."""
    client = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=client, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
    dist.barrier()  # one that ends at once must not be gone while others still connect to it
    torch.set_num_threads(1)


def run_workers(folders: list[Path]) -> list[int]:
    """Start a worker for each folder, whose ``start.json`` is written; returns their exit codes."""
    return wait_all(start_workers(folders))


def start_workers(folders: list[Path]) -> list[int]:
    """The same without waiting for them; returns their process ids. Their output goes to ``output.log``."""
    return start_all([partial(main, folder) for folder in folders], logs=folders)


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


def wait_all(pids: list[int]) -> list[int]:
    """Exit codes of these children; minus the signal where one was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def start_all(bodies: Sequence[Callable[[], None]], logs: list[Path] | None = None) -> list[int]:
    """Run each body in a forked process; returns their process ids."""
    pids = []
    for number, body in enumerate(bodies):
        pid = os.fork()
        if pid == 0:
            code = 1
            die_with_parent()
            try:
                if logs is not None:
                    handle = os.open(logs[number] / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                    os.dup2(handle, 1)
                    os.dup2(handle, 2)
                    sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)  # in place of pytest's
                    faulthandler.enable(sys.stderr)
                body()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


@contextmanager
def rendezvous_store() -> Iterator[int]:
    """A rendezvous store in a process of its own; yields its port.

    A store has threads, and a process with threads must not fork: a child may inherit a lock that nobody will release.
    """
    reading, writing = os.pipe()

    def serve() -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        signal.pause()

    (pid,) = start_all([serve])
    os.close(writing)
    try:
        port = os.read(reading, 16)
        assert port, "the rendezvous store did not start"
        yield int(port)
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        wait_all([pid])
