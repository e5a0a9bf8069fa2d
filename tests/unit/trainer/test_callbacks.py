"""Callbacks never stand in training's way: not by being slow, not by failing; and wrong options end with a sentence."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lockstep_api.v1alpha1 import CallbackSpec, S3Spec
from lockstep_trainer.callbacks import Callback, Callbacks, Checkpoint, Evaluation, Run, Step, runner
from lockstep_trainer.errors import UserError

TOLD: list[tuple[str, Any]] = []
GATE = threading.Event()


def run_of(folder: Path, *, step: int = 0, generation: int = 1) -> Run:
    """The job as a worker describes it."""
    return Run(
        name="job", namespace="ns", uid="0f-uid", spec={"nodes": 1, "trainer": {"recipe": {"steps": 20, "seed": 3}}},
        step=step, steps=20, epoch=1, generation=generation, world_size=1, parameters=100,
        store=f"file://{folder}/ns/job/0f-uid", s3=S3Spec(),
    )  # fmt: skip


def step_of(number: int, loss: float = 1.0) -> Step:
    """A step record."""
    return Step(
        step=number, at=1.7e9 + number, seconds=0.5, loss=loss, tokens=100, grad_norm=2.0, lr=0.1,
        sections={"forward": 0.2}, extra={"mfu": 0.4},
    )  # fmt: skip


class Recorder(Callback):
    """Tells what it is told."""

    def __init__(self, *, name: str = "") -> None:
        self.name = name

    def on_start(self, run: Run) -> None:
        TOLD.append(("start", run.step))

    def on_step(self, step: Step) -> None:
        TOLD.append(("step", step.step))

    def on_evaluation(self, evaluation: Evaluation) -> None:
        TOLD.append(("evaluation", evaluation.loss))

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        TOLD.append(("checkpoint", checkpoint.step))

    def on_end(self, outcome: str) -> None:
        TOLD.append(("end", outcome))


class Slow(Recorder):
    """Waits before its first step."""

    def on_step(self, step: Step) -> None:
        GATE.wait()
        super().on_step(step)


class Failing(Recorder):
    """Fails at step 2."""

    def on_step(self, step: Step) -> None:
        if step.step == 2:
            raise RuntimeError("the server is away")
        super().on_step(step)


class Particular(Callback):
    """Refuses its options."""

    def __init__(self, *, rate: int) -> None:
        if rate > 1:
            raise UserError(f"trainer.callbacks: rate {rate} is more than 1; lower it")
        raise OSError("no route to host")


def no_callback() -> int:
    """Makes something else."""
    return 3


@pytest.fixture(autouse=True)
def clean() -> None:
    TOLD.clear()
    GATE.clear()


def opened(callback: str, **options: Any) -> Callbacks:
    """The callbacks of a job with this one."""
    return Callbacks.open([CallbackSpec(module=f"{__name__}:{callback}", options=options)], leads=True)


def test_hooks_are_called_in_order(tmp_path: Path) -> None:
    callbacks = opened("Recorder", name="x")
    callbacks.start(run_of(tmp_path, step=4))
    callbacks.step(step_of(5))
    callbacks.evaluation(Evaluation(step=5, loss=1.5, tokens=10))
    callbacks.checkpoint(Checkpoint(step=5, seconds=0.1))
    callbacks.close("finished")
    callbacks.close("failed")  # the end comes once
    assert TOLD == [("start", 4), ("step", 5), ("evaluation", 1.5), ("checkpoint", 5), ("end", "finished")]


def test_only_rank_0_has_callbacks() -> None:
    specs = [CallbackSpec(module="no_such_module:Thing")]
    assert not Callbacks.open(specs, leads=False)


def test_a_slow_callback_loses_steps_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "PENDING_STEPS", 4)
    callbacks = opened("Slow")
    callbacks.start(run_of(tmp_path))
    begun = time.monotonic()
    for number in range(1, 51):
        callbacks.step(step_of(number))
    callbacks.evaluation(Evaluation(step=50, loss=1.5, tokens=10))
    assert time.monotonic() - begun < 5  # it did not wait for a gate that is still shut
    GATE.set()
    callbacks.close("finished")
    steps = [value for what, value in TOLD if what == "step"]
    assert steps[:4] == [1, 2, 3, 4]
    assert steps == sorted(set(steps))
    assert 4 <= len(steps) <= 5  # those in the queue, and the one that was being told, whenever it was taken out
    assert TOLD[-2:] == [("evaluation", 1.5), ("end", "finished")]
    assert f"{50 - len(steps)} steps were left out" in caplog.text


def test_a_callback_that_fails_is_off_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    specs = [CallbackSpec(module=f"{__name__}:{name}") for name in ("Failing", "Recorder")]
    callbacks = Callbacks.open(specs, leads=True)
    callbacks.start(run_of(tmp_path))
    for number in (1, 2, 3):
        callbacks.step(step_of(number))
    callbacks.close("finished")
    steps = sorted(value for what, value in TOLD if what == "step")
    assert steps == [1, 1, 2, 3]
    assert [what for what, _ in TOLD].count("end") == 1
    assert "Failing failed in on_step and is off" in caplog.text
    assert "the server is away" in caplog.text


def test_the_end_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(runner.END_SECONDS, "interrupted", 0.05)
    callbacks = opened("Slow")
    callbacks.start(run_of(tmp_path))
    callbacks.step(step_of(1))
    callbacks.close("interrupted")
    assert "did not end in time" in caplog.text
    GATE.set()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Recorder", {"nmae": "x"}, r"trainer.callbacks\[0\].options: .*'nmae'; it takes \(\*, name: "),
        ("Particular", {"rate": 2}, "rate 2 is more than 1; lower it"),
        ("no_callback", {}, r"makes a int; it must make a lockstep_trainer.callbacks.Callback"),
        ("Nothing", {}, r"trainer.callbacks\[0\].module: .* has no 'Nothing'"),
    ],
)
def test_a_wrong_configuration_is_the_users_error(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        opened(name, **options)


def test_a_constructor_that_breaks_leaves_the_callback_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert not opened("Particular", rate=1)
    assert "no route to host" in caplog.text
