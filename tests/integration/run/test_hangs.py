"""A generation that makes no step any more ends by itself, and the status says which rank was stuck, and where."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.run import small
from localrun import LocalRun, victims
from localrun.run import QUICKSTART
from lockstep_api.v1alpha1 import Fault

pytestmark = [pytest.mark.run, pytest.mark.timeout(180)]

STEPS = 400
LOSS = """
import os
import time
from pathlib import Path

import torch.distributed as dist
from torch.nn.functional import cross_entropy

CALLS = 0


def loss(logits, targets):
    global CALLS
    CALLS += 1
    flag = Path({flag!r})
    if dist.get_rank() == 1 and CALLS == 60 and not flag.exists():
        flag.touch()
        wait_for_ever()
    return cross_entropy(logits, targets, reduction="sum")


def wait_for_ever():
    while True:
        time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRun]:
    folder = tmp_path_factory.mktemp("hangs")
    manifest = folder / "job.yaml"
    shutil.copyfile(QUICKSTART, manifest)
    (folder / "stuck.py").write_text(LOSS.format(flag=str(folder / "was-stuck")))
    overrides = [
        *small.overrides(STEPS),
        "trainer.recipe.loss=stuck:loss",
        "resilience.hang.minimumSeconds=3",
        "resilience.hang.meetingSeconds=3",
    ]
    with LocalRun(folder, overrides, manifest=manifest) as run:
        yield run


def hang(run: LocalRun, number: int) -> Fault:
    """The job's ``number``-th fault, once it is mended."""
    status = run.until(
        lambda status: len(status.faults) >= number and status.faults[number - 1].steps_lost is not None,
        90, f"recovery {number}",
    )  # fmt: skip
    fault = status.faults[number - 1]
    assert (fault.cause, fault.witness, fault.rung) == ("Hang", "progress", "process")
    # After 3 s or five steps' time without one, counted from the instant when the next was due: one step's time later.
    assert fault.seconds["detect"] >= 3 - 3 / 5
    return fault


def test_an_endless_loop_in_ones_own_code_is_named_with_its_line(run: LocalRun) -> None:
    fault = hang(run, 1)
    assert fault.rank == 1
    assert "rank 1 keeps the others waiting: it is in " in fault.message
    assert "stuck.py" in fault.message
    assert "wait_for_ever" in fault.message
    assert "in which rank 0 waits" in fault.message
    assert any("stuck.py" in line and "loss" in line for line in fault.log_tail)


def test_a_stopped_process_is_named(run: LocalRun) -> None:
    run.until_step(run.status.progress.step + 5)
    victim = next(victim for victim in victims.workers(run.state) if victim.rank == 0)
    os.kill(victim.pid, signal.SIGSTOP)
    fault = hang(run, 2)
    assert fault.rank == 0
    assert "its process is stopped" in fault.message


def test_one_that_stops_while_its_generation_meets_is_named_soon(run: LocalRun) -> None:
    """Long before the bound for the first step, half an hour."""
    run.until_step(run.status.progress.step + 5)
    term = max(victim.term for victim in victims.workers(run.state))
    os.kill(next(victim.pid for victim in victims.workers(run.state) if victim.rank == 0), signal.SIGKILL)
    victims.stop_in_section(run.state, "rendezvous", rank=1, seconds=30, after_term=term)
    fault = run.until(lambda status: len(status.faults) >= 4, 60, "the hang").faults[3]
    assert (fault.cause, fault.witness, fault.rank) == ("Hang", "progress", 1)
    assert "its process is stopped" in fault.message


def test_it_ends_with_every_sample_once(run: LocalRun) -> None:
    result = run.finish(120)
    assert result.code == 0, result.errors
    assert run.check(STEPS).exact
    assert "was-stuck" in {path.name for path in Path(run.state).parent.iterdir()}
