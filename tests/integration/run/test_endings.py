"""How a run ends when it does not simply succeed: user errors, Ctrl-C, a killed command; and scripts of users' own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from integration.run import small
from localrun import LocalRun, victims
from lockstep_api.v1alpha1 import Phase

pytestmark = [pytest.mark.run, pytest.mark.timeout(120)]

SCRIPT = Path(__file__).with_name("user_script.py")


def script_manifest(folder: Path, crash_at: int | None) -> Path:
    """A job that runs the user's script on two pods of one process."""
    command = [
        "env",
        *([f"CRASH_AT_STEP={crash_at}"] if crash_at is not None else []),
        "python",
        str(SCRIPT),
        str(folder),
    ]
    file = folder / "job.yaml"
    spec = {"nodes": 2, "gpusPerNode": 1, "command": command}
    manifest = {
        "apiVersion": "lockstep.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": "script"},
        "spec": spec,
    }
    file.write_text(yaml.safe_dump(manifest))
    return file


@pytest.mark.parametrize(("crash_at", "says"), [(None, "from step 0"), (6, "from step 6")])
def test_a_torchrun_script_runs(tmp_path: Path, crash_at: int | None, says: str) -> None:
    with LocalRun(tmp_path, ["spec.command.0=env"], manifest=script_manifest(tmp_path, crash_at)) as run:
        result = run.finish(100)
        assert result.code == 0, result.errors + run.output()
        said = (tmp_path / "done").read_text()
        assert said == f"12 steps on 2 ranks {says}", run.output()
        assert result.status.restarts.process == (0 if crash_at is None else 1), run.output()
    if crash_at is not None:
        fault = result.status.faults[-1]
        assert fault.exit_code == 17
        assert any("crashing on purpose" in line for line in fault.log_tail)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.model={module: 'imaginary:model'}", "imaginary"),
        ("trainer.data.sources.0.uri=file:///nowhere/*.txt", "file:///nowhere/*.txt"),
    ],
)
def test_a_user_error_fails_at_once_with_a_sentence(tmp_path: Path, override: str, says: str) -> None:
    with LocalRun(tmp_path, [*small.overrides(20), override]) as run:
        result = run.finish(60)
    assert result.code == 1
    assert says in result.errors
    assert len(result.errors.strip().splitlines()) == 1, result.errors
    assert result.status.restarts.total == 0


def gone(pids: set[int], seconds: float) -> bool:
    """Whether all processes end in time."""
    deadline = time.monotonic() + seconds
    while any(victims.alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_the_command_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    with LocalRun(tmp_path, small.overrides(100_000)) as run:
        run.until_step(2)
        processes = victims.descendants(run.process.pid)
        assert len(processes) >= 8  # supervisors, agents, zygotes, workers
        os.kill(run.process.pid, number)
        run.process.wait(20)
        assert gone(processes, 15), [pid for pid in processes if victims.alive(pid)]
        if number == signal.SIGKILL:
            return
        assert run.process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        status, said = run.status, run.errors_file.read_text()
    assert status.phase == Phase.FAILED
    (failed,) = [one for one in status.conditions if one.type == "Failed"]
    assert failed.reason == "Interrupted"
    assert "The run was interrupted." in said
    assert failed.message in said


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("nodes=0", "spec.nodes"),
        ("trainer.model.preset=llama-imaginary", "llama-imaginary"),
        ("trainer.model.overrides={layerz: 2}", "layerz"),
    ],
)
def test_a_job_that_can_not_run_ends_before_anything_starts(tmp_path: Path, override: str, says: str) -> None:
    with LocalRun(tmp_path, [override]) as run:
        result = run.finish(20)
    assert result.code == 2
    assert says in result.errors
    assert not run.state.exists()
