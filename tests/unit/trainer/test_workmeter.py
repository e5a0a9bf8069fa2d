"""What a step's record says of the rank's own work, and when it says nothing."""

from __future__ import annotations

import pytest
import torch

from lockstep_trainer.batch import Batch
from lockstep_trainer.measuring.clocks import HostClock
from lockstep_trainer.measuring.hostpauses import HostPauses
from lockstep_trainer.measuring.ownwork import OwnWork
from lockstep_trainer.measuring.workmeter import WorkMeter
from lockstep_trainer.measuring.yardstick import EVERY
from lockstep_trainer.stragglers.settings import PATIENCE

CPU = torch.device("cpu")
TOKENS = torch.zeros(2, 8, dtype=torch.int64)


def meter(blocks: int) -> WorkMeter:
    own = OwnWork(HostClock())
    own.blocks = blocks
    return WorkMeter(own, CPU, local_step=True)


def test_where_it_is_off_nothing_is_told() -> None:
    off = WorkMeter(None, CPU)
    off.batch(Batch(TOKENS, TOKENS))
    with off.windows(), off.optimizer():
        pass
    assert not any(off.device_due(step) for step in range(100))
    assert off.take() is None


def test_a_rank_without_windows_tells_nothing_rather_than_something_wrong() -> None:
    blind = meter(blocks=0)
    with blind.optimizer():
        pass
    assert not any(blind.device_due(step) for step in range(100))
    assert blind.take() is None


def test_a_step_in_which_more_is_computed_than_its_batch_is_not_told_and_leaves_nothing_to_the_next() -> None:
    one = meter(blocks=2)
    one.batch(Batch(TOKENS, TOKENS))
    with one.windows(measured=False), one.optimizer():
        pass
    assert one.take() is None
    with one.windows():
        pass
    told = one.take()
    assert told is not None
    assert (told.compute, told.tokens, told.squares) == (0.0, 16, 128)


@pytest.mark.parametrize(("device", "late"), [("cpu", 1.5), ("cuda", 1.0)])
def test_what_a_host_stands_still_while_its_gpu_has_work_makes_nobody_wait(device: str, late: float) -> None:
    waited, host = [0.0], HostPauses()
    host.begin(delay=lambda: waited[0], throttled=lambda: 0.0)
    own = OwnWork(HostClock(host.seconds))
    one = WorkMeter(own, torch.device(device), host=host)
    own.blocks = 1  # behind it: a yardstick would need the device
    with one.windows():
        waited[0] += 0.5
    waited[0] += 1.0  # between two steps
    told = one.take()
    one.close()
    assert told is not None
    assert told.host == pytest.approx(late)


def test_the_device_is_measured_in_time_for_an_answer_and_told_once() -> None:
    assert EVERY < PATIENCE
    one = meter(blocks=2)
    assert [step for step in range(1, 33) if one.device_due(step)] == [8, 16, 24, 32]
    one.measure_device()
    first, second = one.take(), one.take()
    assert first is not None
    assert second is not None
    assert first.product
    assert first.copy
    assert (second.product, second.copy) == (None, None)
