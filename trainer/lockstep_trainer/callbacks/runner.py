"""Runs the job's callbacks beside training, each in a thread with a queue of its own.

Training never waits for a callback, but at its end. A queue holds up to PENDING_STEPS steps; while it is full further
steps are left out, and the log says how many. A callback that raises is turned off.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from lockstep_api.v1alpha1 import CallbackSpec
from lockstep_trainer.callbacks.base import Callback, Checkpoint, Evaluation, Outcome, Run, Step
from lockstep_trainer.errors import UserError
from lockstep_trainer.modules import call, load_callable

log = logging.getLogger(__name__)

PENDING_STEPS = 1024
"""Steps that wait for one callback at most."""
END_SECONDS = {"finished": 30.0, "failed": 5.0, "interrupted": 2.0}
"""How long the end of the process waits for callbacks in all. Where the job goes on, others wait for this process."""
BUILT_IN = {
    "tensorboard": "lockstep_trainer.callbacks.tensorboard:TensorBoard",
    "wandb": "lockstep_trainer.callbacks.wandb:WeightsAndBiases",
    "mlflow": "lockstep_trainer.callbacks.mlflow:MLflow",
}


class Callbacks:
    """All callbacks of a job, as its training loop sees them. Empty on ranks that do not lead."""

    def __init__(self, threads: list[CallbackThread]) -> None:
        self._threads = threads

    @classmethod
    def open(cls, specs: list[CallbackSpec], *, leads: bool) -> Self:
        """Make them; raises UserError for what is not there or takes other options."""
        made = [_make(spec, f"trainer.callbacks[{number}]") for number, spec in enumerate(specs)] if leads else []
        return cls([CallbackThread(name, callback) for name, callback in made if callback is not None])

    def start(self, run: Run) -> None:
        """Before the first step."""
        for thread in self._threads:
            thread.start()
            thread.tell("on_start", run)

    def step(self, step: Step) -> None:
        """After each step."""
        for thread in self._threads:
            thread.tell("on_step", step)

    def evaluation(self, evaluation: Evaluation) -> None:
        """After each evaluation."""
        for thread in self._threads:
            thread.tell("on_evaluation", evaluation)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """After each save that the job may go on from."""
        for thread in self._threads:
            thread.tell("on_checkpoint", checkpoint)

    def close(self, outcome: Outcome) -> None:
        """At the end of the process; waits for callbacks, but not for ever. A second call does nothing."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.tell("on_end", outcome)
        deadline = time.monotonic() + END_SECONDS[outcome]
        for thread in threads:
            thread.join(deadline)

    def __bool__(self) -> bool:
        return bool(self._threads)


class CallbackThread:
    """One callback, its queue and its thread."""

    def __init__(self, name: str, callback: Callback) -> None:
        self.name = name
        self._callback = callback
        self._queue: deque[tuple[str, Any]] = deque()
        self._steps = 0  # of the queue's entries
        self._dropped = 0
        self._off = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"callback {name}", daemon=True)

    def start(self) -> None:
        """Begin to call it."""
        self._thread.start()

    def tell(self, hook: str, argument: Any) -> None:
        """Queue a call; a step is left out where too many wait."""
        with self._changed:
            if self._off:
                return
            if hook == "on_step":
                if self._steps >= PENDING_STEPS:
                    self._dropped += 1
                    if self._dropped == 1:
                        log.warning("callback %s is slower than training; steps are left out", self.name)
                    return
                self._steps += 1
            self._queue.append((hook, argument))
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Wait for its last call, until ``deadline`` (monotonic)."""
        if self._thread.ident is None:
            return  # the process ends before training began
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            with self._changed:
                waiting = len(self._queue)
            log.warning("callback %s did not end in time; %d calls are lost", self.name, waiting)

    def _run(self) -> None:
        hook = ""
        while hook != "on_end":
            hook, argument = self._next()
            try:
                getattr(self._callback, hook)(argument)
            except BaseException:
                log.exception("callback %s failed in %s and is off from now on; training goes on", self.name, hook)
                with self._changed:
                    self._off = True
                    self._queue.clear()
                return

    def _next(self) -> tuple[str, Any]:
        with self._changed:
            self._changed.wait_for(lambda: self._queue)
            hook, argument = self._queue.popleft()
            self._steps -= hook == "on_step"
            if self._dropped and self._steps <= PENDING_STEPS // 2:
                log.warning("callback %s: %d steps were left out", self.name, self._dropped)
                self._dropped = 0
            return hook, argument


def _make(spec: CallbackSpec, field: str) -> tuple[str, Callback | None]:
    """The callback and its name; None where its constructor failed in a way that is not the configuration's fault."""
    make: Callable[..., Any] = load_callable(BUILT_IN.get(spec.module, spec.module), f"{field}.module")
    try:
        made = call(make, f"{field}.options", **spec.options)
    except UserError:
        raise
    except Exception:
        log.exception("callback %s can't be made and is left out; training goes on", spec.module)
        return spec.module, None
    if not isinstance(made, Callback):
        raise UserError(
            f"{field}.module: {spec.module} makes a {type(made).__name__}; it must make a "
            "lockstep_trainer.callbacks.Callback"
        )
    return spec.module, made
