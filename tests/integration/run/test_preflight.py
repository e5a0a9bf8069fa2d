"""Pods whose node fails the checks end before they take part, with what was found, and the run says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gpu.recordings import edited
from integration.run import failing, small
from localrun import LocalRun
from localrun.run import QUICKSTART

pytestmark = [pytest.mark.run, pytest.mark.timeout(300)]


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


def test_a_workers_device_error_has_its_node_looked_at_and_an_unfit_one_is_left(tmp_path: Path) -> None:
    """The worker would go on after a restart, and compute on a GPU with broken memory."""
    answers, brake = tmp_path / "answers.json", tmp_path / failing.BRAKE
    answers.write_text(json.dumps(edited("healthy, with NVLinks")))
    shutil.copy(failing.__file__, tmp_path)
    manifest = Path(shutil.copy(QUICKSTART, tmp_path))
    overrides = [
        *small.overrides(200),
        *("nodes=1", "trainer.recipe.loss=failing:loss", "resilience.budgets.pod=100"),
    ]
    environment = {"LOCKSTEP_NVML_ANSWERS": str(answers)}
    with LocalRun(tmp_path, overrides, manifest=manifest, environment=environment) as run:
        run.until_step(12)
        answers.write_text(json.dumps(edited("ecc error")))
        brake.touch()
        (tmp_path / failing.FAULT).touch()
        run.until(lambda status: "PreflightFailed" in {one.cause for one in status.faults}, 90, "the node is left")
        answers.write_text(json.dumps(edited("healthy, with NVLinks")))
        brake.unlink()
        result = run.finish(150)
        assert result.code == 0, result.errors + run.output()
        left = next(one for one in result.status.faults if one.cause == "PreflightFailed")
        assert left.pod == "quickstart-0-0"
        assert "uncorrectable memory errors" in left.message
        assert run.check(200).exact
