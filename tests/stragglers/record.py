"""``python -m stragglers.record PATH``: records four ranks' own work on this machine; ``recorded`` says how it is kept.

    PYTHONPATH=tests python -m stragglers.record tests/stragglers/traces/cpu4.jsonl.gz --steps 1500

Four processes with a gloo group draw a batch, multiply matrices, and reduce a gradient. ``compute`` is the CPU time of
the products, as a device's events would say it; ``host`` is what the clock on the wall says beyond that: the process
was not given a CPU, or its memory was not there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from forked import run_ranks
from lockstep_trainer.stragglers.work import Work
from stragglers.recorded import write

RANKS, WIDTH, SAMPLES, LAYERS = 4, 256, 128, 6


def record(rank: int, steps: int, folder: Path) -> None:
    """One rank; its lines go to a file of ``folder``."""
    random = torch.Generator().manual_seed(rank)
    weights = [torch.randn(WIDTH, WIDTH, generator=random) / WIDTH**0.5 for _ in range(LAYERS)]
    gradient = torch.zeros(WIDTH * WIDTH)
    with (folder / f"{rank}.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            began = time.perf_counter()
            batch = torch.randn(SAMPLES, WIDTH, generator=random)
            got, used = time.perf_counter(), time.thread_time()
            for weight in weights:
                batch = torch.relu(batch @ weight)
            computed, used = time.perf_counter(), time.thread_time() - used
            dist.all_reduce(gradient)
            left = time.perf_counter()
            line = [step, used, got - began, max(0.0, computed - got - used), left - computed]
            file.write(json.dumps(line) + "\n")


def together(folder: Path) -> Iterator[tuple[int, list[Work]]]:
    """The ranks' files, step by step."""
    ranks = [[json.loads(line) for line in (folder / f"{rank}.jsonl").open()] for rank in range(RANKS)]
    for lines in zip(*ranks, strict=True):
        yield (
            lines[0][0],
            [
                Work(rank, compute, data, host, {"data": waited}, SAMPLES, SAMPLES * SAMPLES)
                for rank, (_, compute, data, host, waited) in enumerate(lines)
            ],
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="stragglers.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    head = {
        "what": f"{RANKS} ranks, {LAYERS} products of {SAMPLES}×{WIDTH} by {WIDTH}×{WIDTH}, float32, gloo",
        "command": f"python -m stragglers.record {arguments.path.name} --steps {arguments.steps}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores {platform.machine()}, load {load:.0f}, torch {torch.__version__}",
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run_ranks(RANKS, lambda rank: record(rank, arguments.steps, folder), timeout=3600)
        write(arguments.path, head, together(folder))


if __name__ == "__main__":
    main()
