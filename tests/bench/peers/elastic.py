"""The same training under torchrun, as its users run it when it shall survive faults: this file is the script.

    torchrun --standalone --nproc-per-node 8 --max-restarts 1000 --monitor-interval 0.1 elastic.py FOLDER

Each attempt meets under a prefix of its own in the launcher's store: with torch's defaults workers on gloo read the
addresses of the attempt before, and do not start again. Every ``EVERY`` steps a
distributed checkpoint, saved beside the next steps (``async_save``), and the newest whole one is loaded at the start.
Rank 0 writes a line per step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[:0] = os.environ.get("BENCH_PATH", "").split(":")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402

from bench.peers.training import Size, Training  # noqa: E402

EVERY = 5
SIZE = Size(dim=64, layers=2, vocab=300, tokens=64)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    prefixed = dist.PrefixStore(f"attempt{attempt}", store)
    dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    training = Training(SIZE, rank, ranks)
    step, saved = load(folder, training.state())
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    control: Any = dist.new_group(backend="gloo")
    saving: list[Future[Any]] = []

    def wait() -> None:
        while saving:
            saving.pop().result()

    while True:
        training.step(wait, lambda: False)
        step += 1
        if rank == 0:
            with (folder / "steps.jsonl").open("a") as file:
                line = {"step": step, "at": time.time(), "attempt": int(attempt), "from": saved}
                file.write(json.dumps(line) + "\n")
        if step % EVERY == 0:
            name = folder / f"step-{step}-{attempt}"
            saving.append(dcp.async_save(training.state(), checkpoint_id=name, process_group=control))  # type: ignore[arg-type]


def load(folder: Path, state: dict[str, Any]) -> tuple[int, int]:
    """The newest checkpoint that is whole, on all ranks the same: its step, twice; 0 without one."""
    whole = [(int(path.parent.name.split("-")[1]), path.parent) for path in folder.glob("step-*/.metadata")]
    newest: list[Any] = [max(whole, default=None)]
    dist.broadcast_object_list(newest)
    if newest[0] is None:
        return 0, 0
    dcp.load(state, checkpoint_id=newest[0][1])
    return newest[0][0], newest[0][0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
