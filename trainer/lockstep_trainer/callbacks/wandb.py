"""Weights & Biases: one run over all restarts, its id is the job's uid.

Online, a process that goes on asks the server how far the run is and leaves out steps that it has already. Offline
(``mode: offline``), every process writes a folder of its own with the same run id; ``wandb sync --append`` joins them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from lockstep_trainer.callbacks.base import Callback, Evaluation, Outcome, Run, Step
from lockstep_trainer.errors import UserError

if TYPE_CHECKING:
    import wandb

_MODES = ("online", "offline", "disabled")


class WeightsAndBiases(Callback):
    """``project``, ``entity``, ``name``, ``group``, ``tags`` (comma-separated) as in ``wandb.init``. ``mode``: online,
    offline or disabled; without it WANDB_MODE, else online. ``folder``: where it keeps its files. The key is taken from
    WANDB_API_KEY."""

    def __init__(
        self,
        *,
        project: str = "lockstep",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: str = "",
        mode: str | None = None,
        folder: str | None = None,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError("trainer.callbacks: wandb is not installed where the job runs; pip install wandb")
        if mode is not None and mode not in _MODES:
            raise UserError(f"trainer.callbacks: mode of wandb is {mode!r}; choose one of {', '.join(_MODES)}")
        self._project, self._entity, self._name, self._group = project, entity, name, group
        self._tags = [tag.strip() for tag in tags.split(",") if tag.strip()]
        self._mode, self._folder = mode, folder
        self._known = 0  # steps that the server has
        self._run: wandb.Run | None = None

    def on_start(self, run: Run) -> None:
        """Start the run, or go on with it."""
        if self._mode in ("offline", "disabled"):
            # Read at import. Reports of errors and use go out whatever the mode, from threads that stay.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            id=run.uid,
            resume="allow",
            project=self._project,
            entity=self._entity,
            name=self._name or run.name,
            group=self._group,
            tags=self._tags or None,
            config={"namespace": run.namespace, "uid": run.uid, "parameters": run.parameters, "spec": dict(run.spec)},
            mode=self._mode,  # type: ignore[arg-type]
            dir=self._folder,
            # The worker's output is the agent's; a worker has no terminal.
            settings=wandb.Settings(console="off", silent=True),
        )
        self._known = max(0, self._run.step - 1) if self._run.resumed else 0
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def on_step(self, step: Step) -> None:
        """A point on each curve."""
        self._log(step.step, step.scalars())

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Joins the step's own row."""
        self._log(evaluation.step, evaluation.scalars())

    def on_end(self, outcome: Outcome) -> None:
        """An interrupted run stays resumable: the next process goes on with it."""
        if self._run:
            import wandb

            code = 0 if outcome == "finished" else 1
            self._run.finish(exit_code=code)
            # finish() returns a moment before everything is in the file, and wandb's own process is in our group: it
            # is killed when this worker is gone.
            wandb.teardown(code)

    def _log(self, step: int, values: dict[str, float]) -> None:
        assert self._run
        if step > self._known:
            self._run.log({"step": step, **values}, step=step)
