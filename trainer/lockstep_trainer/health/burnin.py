"""Matrix products and copies on one device: how fast, and whether the same product is the same each time.

    python -m lockstep_trainer.health.burnin --device 0 --seconds 5      prints one JSON object

A process for each GPU, all at once: power and heat are then those of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import torch

from lockstep_trainer.health.measured import Burn

GPU_SIZE, CPU_SIZE = 8192, 512
"""Rows and columns of the matrices. On a GPU large enough for the arithmetic to be what takes time."""
GPU_BYTES, CPU_BYTES = 1 << 30, 1 << 24
"""Of a copy: far more than caches hold."""
BATCH = 10
"""Products between two comparisons, and copies between two looks at the clock."""


def burn_in(device: torch.device, seconds: float) -> Burn:
    """Measure; about half of ``seconds`` for products, the rest for copies."""
    on_gpu = device.type == "cuda"
    rounds, unequal, rate = _products(device, seconds / 2)
    rates = {"matmul": rate}
    size, each = (GPU_BYTES, seconds / 6) if on_gpu else (CPU_BYTES, seconds / 2)
    there = torch.ones(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)
    rates["copy"] = 2 * size / _seconds(device, each, lambda: other.copy_(there)) / 1e9  # read and written
    if on_gpu:
        here = torch.ones(size, dtype=torch.uint8, pin_memory=True)
        rates["h2d"] = size / _seconds(device, each, lambda: other.copy_(here, non_blocking=True)) / 1e9
        rates["d2h"] = size / _seconds(device, each, lambda: here.copy_(there, non_blocking=True)) / 1e9
    model = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    return Burn(device.index or 0, model, {name: round(rate, 3) for name, rate in rates.items()}, rounds, unequal)


def _products(device: torch.device, seconds: float) -> tuple[int, int, float]:
    """(products, how many differ from the first, TFLOP/s)."""
    on_gpu = device.type == "cuda"
    size, kind = (GPU_SIZE, torch.bfloat16) if on_gpu else (CPU_SIZE, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, dtype=kind, device=device, generator=generator) for _ in range(2))
    expected = left @ right
    results = [torch.empty_like(expected) for _ in range(BATCH)]
    rounds, unequal = 0, 0
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        _finish(device)
        begun = time.perf_counter()
        for result in results:
            torch.matmul(left, right, out=result)
        _finish(device)
        times.append((time.perf_counter() - begun) / BATCH)
        rounds += BATCH
        unequal += sum(not torch.equal(expected, result) for result in results)
    # The second half: clocks have then fallen to what power and heat allow.
    return rounds, unequal, 2 * size**3 / statistics.median(times[len(times) // 2 :]) / 1e12


def _seconds(device: torch.device, budget: float, act: Callable[[], object]) -> float:
    """What one ``act`` takes, the median."""
    act()
    times: list[float] = []
    end = time.perf_counter() + budget
    while not times or time.perf_counter() < end:
        _finish(device)
        begun = time.perf_counter()
        for _ in range(BATCH):
            act()
        _finish(device)
        times.append((time.perf_counter() - begun) / BATCH)
    return statistics.median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="lockstep_trainer.health.burnin")
    parser.add_argument("--device", type=int, help="index of the GPU; without it, the CPU")
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    device = torch.device("cpu") if arguments.device is None else torch.device("cuda", arguments.device)
    try:
        burn = burn_in(device, arguments.seconds)
    except RuntimeError as error:  # out of memory, or the device's own errors
        burn = Burn(arguments.device or 0, "", error=str(error).splitlines()[0])
    print(json.dumps(dataclasses.asdict(burn)), flush=True)


if __name__ == "__main__":
    main()
