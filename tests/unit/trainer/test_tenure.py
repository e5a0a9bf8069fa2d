"""Workers that go on with another generation in the same process: the same bits, and nothing that piles up."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from forked import rendezvous_store, start_workers, wait_all, worker_folders
from lockstep_api.v1alpha1 import TrainingJobSpec
from lockstep_trainer.control import CONTROL, CONTROL_SIGNAL, IDLE
from lockstep_trainer.steprecord import StepReader, StepRecordError

WARM = 4
"""Generations until a process has what it keeps: buffers, caches, threads."""
SPEC = {
    "nodes": 1,
    "gpusPerNode": 2,
    "trainer": {
        "model": {"preset": "llama-debug", "overrides": {"dim": 32, "layers": 2, "ffn_dim": 64}},
        "tokenizer": {"train": {"vocabSize": 320}},
        "data": {"sources": [{"uri": "file://{stdlib}/email/**/*.py"}], "sequenceLength": 16},
        "recipe": {"steps": 100_000, "globalBatchTokens": 128, "precision": "fp32"},
    },
}


class Pair:
    """Two workers, and the part of an agent that tells them where to go."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.port = root, port
        checkpoint = {"uri": f"file://{root}/store", "every": 2}
        spec = TrainingJobSpec.model_validate({**SPEC, "checkpoint": checkpoint})
        self.job = root / "job.json"
        self.job.write_text(json.dumps({"name": "job", "namespace": "ns", "uid": "uid", "spec": spec.to_wire()}))
        self.generation = 0
        self.folders = self.next()
        self.pids = start_workers(self.folders)

    def next(self) -> list[Path]:
        """Orders of another generation, from fresh weights."""
        self.generation += 1
        prefix = f"{self.root.name}/{self.generation}"
        meeting = {"host": "127.0.0.1", "port": self.port, "prefix": prefix}
        return worker_folders(
            self.root, self.job, ranks=2, port=self.port, generation=self.generation, rendezvous=meeting, stays=True
        )

    def control(self, rank: int, said: dict[str, Any]) -> None:
        path = self.folders[rank] / CONTROL
        path.with_suffix(".new").write_text(json.dumps(said))
        path.with_suffix(".new").rename(path)
        os.kill(self.pids[rank], CONTROL_SIGNAL)

    def losses(self, rank: int) -> dict[int, tuple[float, float]]:
        with suppress(FileNotFoundError, StepRecordError):
            records = StepReader(self.folders[rank] / "steps").new_records()
            return {record.step: (record.loss, record.grad_norm) for record in records}
        return {}

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (self.folders[0] / "output.log").read_text()
            time.sleep(0.005)

    def idle(self, rank: int) -> dict[str, Any] | None:
        path = self.folders[rank] / IDLE
        said: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return said

    def ended(self, rank: int) -> bool:
        """A worker may end instead, where a collective could not be broken off."""
        said = os.waitid(os.P_PID, self.pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert said is None or said.si_status == 75, said
        return said is not None

    def out(self, rank: int) -> bool:
        """It is out of its generation, or has ended."""
        return self.idle(rank) is not None or self.ended(rank)

    def go_on(self) -> None:
        """The next generation, in the processes that are there."""
        ended, after = [self.ended(rank) for rank in (0, 1)], self.next()
        for rank in (0, 1):
            if ended[rank]:
                wait_all([self.pids[rank]])
                (self.pids[rank],) = start_workers(after[rank : rank + 1])
            else:
                self.control(rank, {"join": str(after[rank])})
        self.folders = after

    def held(self, rank: int) -> tuple[int, int, float]:
        """Descriptors, threads, and MB that only this process has."""
        process = Path("/proc", str(self.pids[rank]))
        lines = (process / "smaps_rollup").read_text().splitlines()
        memory = sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024
        return len(os.listdir(process / "fd")), len(os.listdir(process / "task")), memory


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with rendezvous_store() as port:
        pair = Pair(tmp_path, port)
        try:
            yield pair
        finally:
            for pid in pair.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_all(pair.pids)


@pytest.mark.parametrize("generations", [3, pytest.param(34, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_process_that_works_in_many_generations_computes_the_same_and_holds_no_more(
    pair: Pair, generations: int
) -> None:
    first: dict[int, tuple[float, float]] = {}
    held: dict[int, list[tuple[int, int, float]]] = {}
    for generation in range(1, generations + 1):
        pair.until(lambda: all(len(pair.losses(rank)) >= 3 for rank in (0, 1)))
        for rank in (0, 1):  # both at once; else the second one has lost the first before it is told
            pair.control(rank, {"leave": True})
            if generation % 2:
                pair.until(lambda rank=rank: pair.out(rank))  # type: ignore[misc]
        pair.until(lambda: pair.out(0) and pair.out(1))
        said = pair.losses(0)
        first = first or said
        common = first.keys() & said.keys()
        assert len(common) >= 3
        assert {step: first[step] for step in common} == {step: said[step] for step in common}
        for rank in (0, 1):
            if pair.idle(rank):
                held.setdefault(pair.pids[rank], []).append(pair.held(rank))
        if generation < generations:
            pair.go_on()
    kept = max(held.values(), key=len)
    assert len(kept) >= min(generations, 2 * WARM), "processes did not stay"
    (_, _, before), (_, _, after) = kept[min(WARM, len(kept) - 1)], kept[-1]
    # The loader's and the stage's threads and files come and go; what piled up would be one a generation at least.
    assert kept[-1][0] - kept[0][0] < len(kept) - 1, kept
    assert kept[-1][1] - kept[0][1] < len(kept) - 1, kept
    assert after - before < max(1.0, 0.25 * (len(kept) - WARM)), kept  # MB; a model and its optimizer have 0.7


def test_who_waited_for_a_peer_that_never_came_meets_the_next_one(pair: Pair) -> None:
    pair.until(lambda: len(pair.losses(0)) >= 3)
    os.kill(pair.pids[1], signal.SIGKILL)
    wait_all([pair.pids.pop()])
    pair.control(0, {"leave": True})
    pair.until(lambda: pair.idle(0))
    alone = pair.next()
    pair.control(0, {"join": str(alone[0])})
    pair.folders = alone
    pair.until((alone[0] / "steps").exists)
    pair.until(lambda: StepReader(alone[0] / "steps").section == "rendezvous")
    pair.control(0, {"leave": True})
    pair.until(lambda: pair.idle(0))
    after = pair.next()
    pair.pids += start_workers(after[1:])
    pair.control(0, {"join": str(after[0])})
    pair.folders = after
    pair.until(lambda: all(len(pair.losses(rank)) >= 3 for rank in (0, 1)))


def test_who_lost_its_peer_goes_on_with_a_new_one(pair: Pair) -> None:
    pair.until(lambda: len(pair.losses(0)) >= 3)
    os.kill(pair.pids[1], signal.SIGKILL)
    wait_all([pair.pids.pop()])
    pair.control(0, {"leave": True})
    pair.until(lambda: pair.idle(0))
    before, survivor = pair.losses(0), pair.pids[0]
    after = pair.next()
    pair.pids += start_workers(after[1:])
    pair.control(0, {"join": str(after[0])})
    pair.folders = after
    pair.until(lambda: len(pair.losses(0)) >= 3)
    assert pair.pids[0] == survivor
    again = pair.losses(0)
    assert all(again[step] == before[step] for step in (1, 2, 3))
