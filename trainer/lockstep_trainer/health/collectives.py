"""Pairwise and group collectives through torch.distributed, in nccl-tests' columns. One process is one rank.

    RANK=0 WORLD_SIZE=8 LOCAL_RANK=0 MASTER_ADDR=… MASTER_PORT=… python -m lockstep_trainer.health.collectives

prints a JSON object a row: rank 0 the group's, and the lower rank of each pair that pair's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from lockstep_trainer.health.measured import Collective, bus_bandwidth

GROUP_SIZES = (1 << 20, 1 << 26, 1 << 30)
PAIR_SIZE = 1 << 28
CPU_SIZES, CPU_PAIR_SIZE = (1 << 16, 1 << 20), 1 << 20
"""Bytes. The largest shows the links' bandwidth, the smallest their latency."""
REPEATS = 5


def pairings(ranks: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds in which everybody has one partner, so that every two meet once (the circle method); in each round of an
    odd number one rests."""
    seats: list[int | None] = [*range(ranks), *([None] if ranks % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def measure(device: torch.device, rank: int, world: int) -> Iterator[Collective]:
    """All rows that this rank is to tell. The process group is there."""
    on_gpu = device.type == "cuda"
    for size in GROUP_SIZES if on_gpu else CPU_SIZES:
        for operation in ("all_reduce", "all_gather", "reduce_scatter"):
            row = _group(operation, size, device, rank, world)
            if rank == 0:
                yield row
    for pairs in pairings(world):
        dist.barrier()
        for low, high in pairs:
            if rank in (low, high):
                row = _pair(PAIR_SIZE if on_gpu else CPU_PAIR_SIZE, device, rank, (low, high))
                if rank == low:
                    yield row


def _group(operation: str, size: int, device: torch.device, rank: int, world: int) -> Collective:
    count = size // 4 // world * world  # floats
    part = count // world
    if operation == "all_reduce":
        data = torch.zeros(count, device=device)  # which sums leave as they are

        def act() -> None:
            dist.all_reduce(data)

        wanted, result = world * (world + 1) / 2, data
    elif operation == "all_gather":
        mine, data = torch.full((part,), float(rank + 1), device=device), torch.empty(count, device=device)

        def act() -> None:
            dist.all_gather_into_tensor(data, mine)

        wanted, result = float(world), data[-part:]
    else:
        data, result = torch.full((count,), float(rank + 1), device=device), torch.empty(part, device=device)

        def act() -> None:
            dist.reduce_scatter_tensor(result, data)

        wanted = world * (world + 1) / 2
    micros = _microseconds(device, act)
    if operation == "all_reduce":
        data.fill_(rank + 1)
        act()
    wrong = int((result != wanted).sum())
    redop = "none" if operation == "all_gather" else "sum"
    algbw, busbw = bus_bandwidth(operation, world, 4 * count, micros)
    return Collective(operation, f"0-{world - 1}", 4 * count, count, "float", redop, micros, algbw, busbw, wrong)


def _pair(size: int, device: torch.device, rank: int, pair: tuple[int, int]) -> Collective:
    """Both ways at once."""
    peer, count = pair[0] if rank == pair[1] else pair[1], size // 4
    mine, theirs = torch.full((count,), float(rank), device=device), torch.empty(count, device=device)

    def act() -> None:
        operations = [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    micros = _microseconds(device, act)
    wrong = int((theirs != peer).sum())
    algbw, busbw = bus_bandwidth("sendrecv", 2, size, micros)
    return Collective("sendrecv", f"{pair[0]},{pair[1]}", size, count, "float", "none", micros, algbw, busbw, wrong)


def _microseconds(device: torch.device, act: Callable[[], None]) -> float:
    """What one takes, the median; the first is left out, it sets up connections."""
    times: list[float] = []
    for _ in range(REPEATS + 1):
        _finish(device)
        begun = time.perf_counter()
        act()
        _finish(device)
        times.append((time.perf_counter() - begun) * 1e6)
    return statistics.median(times[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Entry point of one rank."""
    parser = argparse.ArgumentParser(prog="lockstep_trainer.health.collectives")
    parser.add_argument("--cpu", action="store_true", help="gloo on the CPU, where there are no GPUs")
    arguments = parser.parse_args()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu") if arguments.cpu else torch.device("cuda", local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if arguments.cpu else "nccl", rank=rank, world_size=world)
    for row in measure(device, rank, world):
        print(json.dumps(dataclasses.asdict(row)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
