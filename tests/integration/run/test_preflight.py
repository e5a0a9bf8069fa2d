"""Pods whose node fails the checks end before they take part, with what was found, and the run says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu.recordings import edited
from integration.run import small
from localrun import LocalRun

pytestmark = [pytest.mark.run, pytest.mark.timeout(180)]


def test_a_machine_that_is_unfit_trains_nothing_and_the_run_says_why(tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(edited("fallen off the bus")))
    overrides = [*small.overrides(), "nodes=1", "resilience.budgets.pod=1"]
    with LocalRun(tmp_path, overrides, environment={"LOCKSTEP_NVML_ANSWERS": str(answers)}) as run:
        result = run.finish(150)
        assert result.code != 0
        status = result.status
        assert (status.epoch, status.slots) == (0, {})
        assert {fault.cause for fault in status.faults} == {"PreflightFailed"}
        failed = next(one for one in status.conditions if one.type == "Failed")
        assert "GPU 0: it does not answer (GpuIsLost)" in failed.message, run.output()
