"""Runs cells: forks their ranks from this process, several cells at once, and judges what they report."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from forked import rendezvous_store, start_all, wait_all
from parity import compare, reference
from parity.cases import Case

LIMITS = {
    "fp64": {"loss": 1e-9, "norm": 1e-9, "gradient": 1e-9, "parameter": 1e-9, "buffer": 0.0},
    # After several steps of AdamW, which divides by the gradient's size, rounding decides where gradients are small.
    "fp32": {"loss": 1e-5, "norm": 1e-5, "gradient": 2e-5},
    "bf16": {"loss": 2e-2, "norm": 1e-1, "gradient": 1e-1},
}
MIXTURES_IN_BF16 = 3e-1
"""Of gradients: rounding sends a few tokens to other experts. A single process in bf16 is as far from float64 (2.1e-1,
the router of the last layer; a dense model 0.6e-1)."""
SECONDS = 240.0  # that a cell may take


@dataclass(frozen=True, slots=True)
class Result:
    """How a cell went."""

    case: Case
    seconds: float
    cpu_seconds: float  # of all its ranks
    errors: dict[str, float | str]  # by kind
    failure: str  # empty: all errors are within their limits


@dataclass(slots=True)
class _Running:
    case: Case
    pids: set[int]
    folder: Path
    began: float
    cpu_seconds: float = 0.0
    failed: bool = False


class Runner:
    """Cells in their order, as many at once as fit; the results come as they are asked for."""

    def __init__(self, cases: Sequence[Case], folder: Path, *, at_once: int | None = None) -> None:
        self.waiting, self.folder = list(cases), folder
        self.ranks_at_once = at_once or max(16, 4 * (os.cpu_count() or 1))
        self.running: list[_Running] = []
        self.done: dict[str, Result] = {}
        self._stack = ExitStack()
        self._port = self._stack.enter_context(rendezvous_store())

    def close(self) -> None:
        """End what still runs."""
        for cell in self.running:
            _kill(cell.pids)
        self._stack.close()

    def result(self, case: Case) -> Result:
        """The result of ``case``, once it is there. Others go on meanwhile."""
        if case not in self.waiting and case.name not in self.done and all(r.case != case for r in self.running):
            self.waiting.insert(0, case)
        while case.name not in self.done:
            self._start()
            self._collect()
            time.sleep(0.02)
        return self.done[case.name]

    def _start(self) -> None:
        while self.waiting:
            busy = sum(cell.case.layout.world_size for cell in self.running)
            case = self.waiting[0]
            if self.running and busy + case.layout.world_size > self.ranks_at_once:
                return
            self.waiting.pop(0)
            folder = self.folder / case.name
            folder.mkdir(parents=True, exist_ok=True)
            bodies = [partial(_rank, case, rank, self._port, self._reference(case), folder) for rank in _ranks(case)]
            pids = start_all(bodies, logs=[folder] * len(bodies))
            self.running.append(_Running(case, set(pids), folder, time.monotonic()))

    def _reference(self, case: Case) -> Path:
        path = self.folder / f"{reference.key(case)}.reference"
        if not path.exists():
            folder = self.folder / reference.key(case)
            folder.mkdir()
            codes = wait_all(start_all([partial(reference.compute, case, path)], logs=[folder]))
            assert codes == [0], f"the reference {reference.key(case)} failed:\n{(folder / 'output.log').read_text()}"
        return path

    def _collect(self) -> None:
        for cell in list(self.running):
            for pid in list(cell.pids):
                ended, status, used = os.wait4(pid, os.WNOHANG)
                if ended:
                    cell.pids.remove(pid)
                    cell.cpu_seconds += used.ru_utime + used.ru_stime
                    cell.failed |= status != 0
            seconds = time.monotonic() - cell.began
            late = seconds > SECONDS
            if (cell.failed or late) and cell.pids:
                time.sleep(0.5)  # the others' errors, which follow from the first, are not worth waiting for
                _kill(cell.pids)
                cell.pids.clear()
            if not cell.pids:
                self.running.remove(cell)
                self.done[cell.case.name] = _judge(cell, seconds, late)


def _ranks(case: Case) -> range:
    return range(case.layout.world_size)


def _rank(case: Case, rank: int, port: int, expected: Path, folder: Path) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(case.name, store),
        rank=rank,
        world_size=case.layout.world_size,
        timeout=timedelta(seconds=SECONDS),
    )
    torch.set_num_threads(1)
    compare.run_rank(case, expected, folder / "result.json")


def _judge(cell: _Running, seconds: float, late: bool) -> Result:
    if cell.failed or late:
        log = (cell.folder / "output.log").read_text()
        why = f"took more than {SECONDS:.0f} s" if late else "a rank failed"
        return Result(cell.case, seconds, cell.cpu_seconds, {}, f"{why}:\n{log[-4000:]}")
    errors = json.loads((cell.folder / "result.json").read_text())
    limits = dict(LIMITS[cell.case.precision])
    if cell.case.precision == "bf16" and cell.case.config.experts:
        limits["gradient"] = MIXTURES_IN_BF16
    wrong = [
        f"{kind} error {errors[kind]:.1e} above {limit:.0e} {errors.get(f'{kind} of', '')}".rstrip()
        for kind, limit in limits.items()
        if not errors[kind] <= limit  # also where it is not a number
    ]
    return Result(cell.case, seconds, cell.cpu_seconds, errors, "; ".join(wrong))


def _kill(pids: set[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_all(list(pids))
