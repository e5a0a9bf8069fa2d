"""The burn-in and the collectives themselves, on this machine's CPU: right values, and what hangs is ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from forked import run_ranks
from lockstep_trainer.health import load
from lockstep_trainer.health.burnin import burn_in
from lockstep_trainer.health.collectives import measure

CPU = torch.device("cpu")


def test_products_and_copies_of_a_sound_cpu_are_the_same_each_time() -> None:
    burn = burn_in(CPU, 0.01)
    assert burn.rounds > 0
    assert burn.unequal == 0
    assert min(burn.rates["matmul"], burn.rates["copy"]) > 0


def test_a_product_that_differs_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = torch.matmul, []

    def wrong(left: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor) -> None:
        right(left, other, out=out)
        calls.append(out)
        if len(calls) == 3:
            out[0, 0] += 1e-3

    monkeypatch.setattr(torch, "matmul", wrong)
    assert burn_in(CPU, 0.01).unequal == 1


def test_collectives_give_right_values_in_every_group_and_pair(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        rows = list(measure(CPU, rank, 3))
        assert all(row.wrong == 0 and row.busbw > 0 for row in rows)
        (tmp_path / str(rank)).write_text("\n".join(f"{row.operation} {row.ranks} {row.size}" for row in rows))

    run_ranks(3, body)
    told = [set((tmp_path / str(rank)).read_text().split("\n")) for rank in range(3)]
    assert {line.split()[1] for line in told[0] | told[1] if line.startswith("sendrecv")} == {"0,1", "0,2", "1,2"}
    assert {line.split()[0] for line in told[0]} == {"all_reduce", "all_gather", "reduce_scatter", "sendrecv"}
    assert told[2] == {""}  # the lower rank of a pair tells


def test_a_process_that_hangs_or_dies_says_which_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {
        "0": "import time; print('{\"rate\": 1}', flush=True); time.sleep(600)",
        "1": "raise SystemExit('CUDA error: an illegal memory access')",
    }
    monkeypatch.setattr(load, "START_SECONDS", 1.0)
    commands = [[sys.executable, "-S", "-c", program] for program in programs.values()]
    hung, died = load._together(commands, [{}, {}], 0.0)
    assert hung.objects == [{"rate": 1}]
    assert hung.error == "no end within 1 s"
    assert died.error == "exit code 1: CUDA error: an illegal memory access"
