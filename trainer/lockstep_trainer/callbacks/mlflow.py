"""MLflow: one run over all restarts, found by the tag that holds the job's uid.

MLflow keeps every value that it is given. A process that goes on therefore asks how far the run is and leaves out the
steps that it has already. Metrics are sent in batches.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lockstep_trainer.callbacks.base import Callback, Checkpoint, Evaluation, Outcome, Run, Step
from lockstep_trainer.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

UID_TAG = "lockstep.uid"
_BATCH = 900
"""Metrics of one request; the server takes 1,000."""
_LONGEST_VALUE = 6000
"""Characters of a parameter that any store takes."""


class MLflow(Callback):
    """``uri``: the tracking server, http(s)://… or file:///folder; without it MLFLOW_TRACKING_URI. ``experiment``:
    its name, made if need be. ``run_name``: the job's name without it. ``flush_seconds``: metrics are sent at least so
    often."""

    def __init__(
        self,
        *,
        uri: str | None = None,
        experiment: str = "lockstep",
        run_name: str | None = None,
        flush_seconds: float = 5.0,
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise UserError("trainer.callbacks: mlflow is not installed where the job runs; pip install mlflow-skinny")
        if not uri and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise UserError(
                "trainer.callbacks: mlflow has no server; set its option uri, or MLFLOW_TRACKING_URI in the template"
            )
        self._uri = uri or os.environ["MLFLOW_TRACKING_URI"]
        self._experiment, self._run_name, self._flush_seconds = experiment, run_name, flush_seconds
        self._known: dict[str, int] = {}
        self._pending: list[Metric] = []
        self._sent = 0.0
        self._client: MlflowClient
        self._run_id = ""

    def on_start(self, run: Run) -> None:
        """Find the job's run, or make it."""
        if self._uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 wants it said
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        runs = self._client.search_runs([experiment], filter_string=f"tags.`{UID_TAG}` = '{run.uid}'", max_results=1)
        if runs:
            self._run_id = runs[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            # Each curve by itself: steps and evaluations are told in two calls, and a kill may come between them.
            self._known = {
                name: max(point.step for point in self._client.get_metric_history(self._run_id, name))
                for name in runs[0].data.metrics
            }
            return
        made = self._client.create_run(
            experiment,
            run_name=self._run_name or run.name,
            tags={UID_TAG: run.uid, "lockstep.namespace": run.namespace, "lockstep.job": run.name},
        )
        self._run_id = made.info.run_id
        for name, value in _flat(run.spec).items():
            self._client.log_param(self._run_id, name, value[:_LONGEST_VALUE])

    def on_step(self, step: Step) -> None:
        """A point on each curve."""
        self._add(step.at, step.step, step.scalars())

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """The same of the evaluations' curves."""
        self._add(time.time(), evaluation.step, evaluation.scalars())

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        """What comes before this step won't be told again."""
        self._flush()

    def on_end(self, outcome: Outcome) -> None:
        """An interrupted run stays running: the next process goes on with it."""
        self._flush()
        if outcome != "interrupted":
            self._client.set_terminated(self._run_id, "FINISHED" if outcome == "finished" else "FAILED")

    def _add(self, at: float, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        milliseconds = int(at * 1000)
        self._pending += [
            Metric(name, value, milliseconds, step)
            for name, value in values.items()
            if step > self._known.get(name, -1)
        ]
        if len(self._pending) >= _BATCH or time.monotonic() - self._sent >= self._flush_seconds:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        for first in range(0, len(pending), _BATCH):
            self._client.log_batch(self._run_id, metrics=pending[first : first + _BATCH])
        self._sent = time.monotonic()


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """The spec's leaves by dotted path; lists as JSON."""
    if not isinstance(value, Mapping):
        return {path: value if isinstance(value, str) else json.dumps(value)}
    leaves: dict[str, str] = {}
    for name, part in value.items():
        leaves |= _flat(part, f"{path}.{name}" if path else str(name))
    return leaves
