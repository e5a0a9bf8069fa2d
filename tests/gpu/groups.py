"""NCCL's groups ended and made again in the same process: seconds, and whether anything is left behind."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GPU = torch.device("cuda", 0)
TIMES = 5


def run(folder: Path) -> dict[str, Any]:
    """Seconds of each part, by how a generation ends."""
    torch.cuda.set_device(GPU)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: dict[str, Any] = {"destroy": [], "abort": []}
    number = 0
    for how in ("destroy", "abort"):
        for _ in range(TIMES):
            number += 1
            found[how].append(_generation(store, number, how))
            print(how, found[how][-1], flush=True)
    for how in ("destroy", "abort"):
        second, last = found[how][1], found[how][-1]
        for what in ("threads", "descriptors"):
            assert last[what] <= second[what], f"{how} leaves {what}: {second[what]} → {last[what]}"
    return found


def _generation(store: dist.Store, number: int, how: str) -> dict[str, Any]:
    times: dict[str, Any] = {}
    begun = time.perf_counter()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore(f"1/{number}", store),
        rank=0,
        world_size=1,
        device_id=GPU,
    )
    group = dist.new_group([0])
    times["init"] = time.perf_counter() - begun
    begun = time.perf_counter()
    total = torch.ones(1 << 20, device=GPU)
    dist.all_reduce(total)
    dist.all_reduce(total, group=group)
    torch.cuda.synchronize()
    times["first_collective"] = time.perf_counter() - begun
    assert float(total.sum()) == 1 << 20
    begun = time.perf_counter()
    if how == "abort":
        for each in (group, dist.group.WORLD):
            backend = each._get_backend(GPU)  # type: ignore[union-attr]
            backend.abort()
    dist.destroy_process_group()
    times["end"] = time.perf_counter() - begun
    times = {name: round(seconds, 4) for name, seconds in times.items()}
    times["threads"] = len(os.listdir("/proc/self/task"))
    times["python_threads"] = threading.active_count()
    times["descriptors"] = len(os.listdir("/proc/self/fd"))
    times["memory_mib"] = torch.cuda.mem_get_info()[0] >> 20
    return times
