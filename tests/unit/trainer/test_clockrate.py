"""A GPU's clock is told while the job trains, and a driver without an answer holds nobody up."""

from __future__ import annotations

import threading

import pytest
import torch

from awaited import eventually
from gpu.recordings import edited
from lockstep_trainer.health.nvml import Nvml
from lockstep_trainer.health.recorded import RecordedNvml
from lockstep_trainer.measuring.clockrate import ClockRate, asking

SECOND = "00000001-0000-0000-0000-000000000000"


def machine(second: str) -> Nvml:
    return RecordedNvml((edited("healthy, with NVLinks"), edited(second, 1)))


def test_the_clock_is_that_of_the_ranks_own_gpu() -> None:
    low = asking(lambda: machine("throttled"), SECOND)()
    usual = asking(lambda: machine("healthy, with NVLinks"), SECOND)()
    assert low is not None
    assert usual is not None
    assert low < usual


@pytest.mark.parametrize("uuid", [SECOND, "of a partition"])
def test_without_an_answer_none_is_told(uuid: str) -> None:
    assert asking(lambda: machine("fallen off the bus"), uuid)() is None
    assert asking(lambda: "LibraryNotFound", uuid)() is None


def test_training_goes_on_while_the_driver_does_not_answer() -> None:
    answers = threading.Event()

    def hangs() -> float:
        answers.wait()
        return 1980.0

    rate = ClockRate(hangs)
    rate.begin()
    assert rate.newest() is None
    answers.set()
    eventually(lambda: rate.newest() == 1980.0, "the answer")
    rate.close()


def test_a_cpu_has_no_such_clock() -> None:
    assert ClockRate.of(torch.device("cpu")) is None
