"""`lockstep run` without its pods: what it makes of what the controller writes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lockstep_api.v1alpha1 import Phase, TrainingJob, TrainingJobStatus
from lockstep_operator import local_run
from unit.operator.builders import CREDENTIALS, make_job


class Ending:
    """A controller whose job has succeeded at once; its statuses are written as a controller does."""

    def __init__(self, job: TrainingJob, backend: Any, links: Any, **more: Any) -> None:
        self._job, self._backend = job, backend

    def wake(self) -> None:
        """Nobody wakes it."""

    async def run(self) -> None:
        for phase in (Phase.RUNNING, Phase.SUCCEEDED):
            self._job = await self._backend.write_status(self._job, TrainingJobStatus(phase=phase))
        await asyncio.Event().wait()


def test_a_status_that_can_not_be_shown_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def show(status: TrainingJobStatus) -> None:
        raise ValueError("no such colour")

    monkeypatch.setattr(local_run, "JobController", Ending)
    running = local_run.run(make_job(), state_dir=tmp_path, on_status=show, credentials=CREDENTIALS)
    assert asyncio.run(asyncio.wait_for(running, 10)).phase == Phase.SUCCEEDED
    assert "its status can't be shown" in caplog.text
