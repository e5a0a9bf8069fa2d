"""Runs a generator on several forked ranks, and hands on what the first of them yields while the others keep step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from forked import meet, rendezvous_store, start_all, wait_all


def yielded(ranks: int, body: Callable[[int], Iterator[dict[str, Any]]], folder: Path) -> Iterator[dict[str, Any]]:
    """What ``body`` yields on rank 0, as JSON can hold it. Its output goes to a file in ``folder``, whose end is in the
    RuntimeError that is raised where a rank fails."""
    with rendezvous_store() as port:
        reading, writing = os.pipe()

        def rank_main(rank: int) -> None:
            os.close(reading)
            meet(rank, ranks, port, timeout=600)
            for found in body(rank):
                if rank == 0:
                    os.write(writing, (json.dumps(found) + "\n").encode())

        log = folder / "output.log"
        log.unlink(missing_ok=True)
        pids = start_all([partial(rank_main, rank) for rank in range(ranks)], logs=[folder] * ranks)
        os.close(writing)
        whole = False
        try:
            with os.fdopen(reading) as lines:
                for line in lines:
                    yield json.loads(line)
            whole = True
        finally:
            if not whole:  # whoever listened has had enough
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            codes = wait_all(pids)
    if codes != [0] * ranks:
        raise RuntimeError(f"the ranks ended with {codes}; {log} ends with {log.read_text()[-3000:]}")
