"""The agent has its node checked before it offers itself: once for each start of the container, in another process."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu.recordings import edited
from lockstep_api.constants import FINDINGS_FILE
from lockstep_api.messages import Term
from lockstep_trainer.agent import agent
from lockstep_trainer.agent import preflight as checks
from lockstep_trainer.agent.preflight import Unfit, preflight
from lockstep_trainer.agent.settings import Job, Settings
from lockstep_trainer.protocol import events, policy


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a pod whose container was started once."""
    folders = {name: tmp_path / name for name in ("run", "config", "token")}
    for folder in folders.values():
        folder.mkdir()
    (folders["run"] / "container-starts").write_text("1")
    variables = {
        "LOCKSTEP_POD_NAME": "run-0-0", "LOCKSTEP_POD_UID": "u", "LOCKSTEP_HOST": "127.0.0.1",
        **{f"LOCKSTEP_{name.upper()}_DIR": str(folder) for name, folder in folders.items()},
        "LOCKSTEP_TERMINATION_LOG": str(tmp_path / "last-words"),
    }  # fmt: skip
    return Settings.from_env(variables)


def job(tier: str | None = None, gpus: int = 1) -> Job:
    """With that field of its resilience, or none."""
    spec: dict[str, Any] = {"nodes": 1, "gpusPerNode": gpus, "resilience": {"preflight": tier} if tier else {}}
    return Job("run", "team", "uid", spec)


def answered(monkeypatch: pytest.MonkeyPatch, folder: Path, *gpus: dict[str, Any]) -> None:
    """NVML answers this."""
    (folder / "answers.json").write_text(json.dumps(gpus))
    monkeypatch.setenv("LOCKSTEP_NVML_ANSWERS", str(folder / "answers.json"))


def test_a_healthy_node_is_checked_once_for_each_start_of_its_container(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(monkeypatch, tmp_path, edited("healthy, with NVLinks"))
    preflight(settings, job())
    answered(monkeypatch, tmp_path, edited("fallen off the bus"))
    preflight(settings, job())  # an agent that was started again: its workers train
    (settings.run_dir / "container-starts").write_text("2")
    with pytest.raises(Unfit):
        preflight(settings, job())


def test_what_takes_a_minute_is_done_once_in_a_pod(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers: list[str] = []

    def run(command: list[str], seconds: float) -> dict[str, Any]:
        tiers.append(command[command.index("--tier") + 1])
        assert seconds == checks.SECONDS[tiers[-1]]
        return {"findings": []}

    monkeypatch.setattr(checks, "_run", run)
    for start in (1, 2, 3):
        (settings.run_dir / "container-starts").write_text(str(start))
        preflight(settings, job("Full"))
    assert tiers == ["Full", "Quick", "Quick"]
    (settings.run_dir / "preflight.json").unlink()
    preflight(replace(settings, checked=True), job("Full"))  # another pod, on a node that an earlier one checked
    assert tiers[3:] == ["Quick"]


@pytest.mark.parametrize(("named", "known"), [("gpu-1,gpu-17", True), ("gpu-171", False), ("", False)])
def test_a_pod_knows_whether_its_node_was_checked(named: str, known: bool) -> None:
    folders = {f"LOCKSTEP_{name.upper()}_DIR": f"/{name}" for name in ("run", "config", "token")}
    pod = {"LOCKSTEP_POD_NAME": "p", "LOCKSTEP_POD_UID": "u", "LOCKSTEP_HOST": "h", "LOCKSTEP_NODE_NAME": "gpu-17"}
    assert Settings.from_env({**folders, **pod, "LOCKSTEP_CHECKED_NODES": named}).checked is known


def test_what_is_fatal_stops_the_agent_and_is_left_where_the_operator_finds_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(monkeypatch, tmp_path, edited("healthy, with NVLinks"), edited("row remap pending", 1))
    with pytest.raises(Unfit, match="a row of its memory waits to be replaced"):
        preflight(settings, job(gpus=2))
    assert settings.termination_log is not None
    said = settings.termination_log.read_text()
    assert said.startswith("GPU 1 (serial 0000000000001, ")
    assert "reset the GPU" in said
    assert not (settings.run_dir / "preflight.json").exists()


def test_an_administrators_table_counts(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, tmp_path, edited("row remap pending"))
    (settings.config_dir / FINDINGS_FILE).write_text("gpu: {remap-pending: {severity: warn}}\n")
    preflight(settings, job())


def test_a_table_that_can_not_be_used_does_not_switch_the_checks_off(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(monkeypatch, tmp_path, edited("row remap pending"))
    (settings.config_dir / FINDINGS_FILE).write_text("gpu: {remap-pending: {severity: nonsense}}\n")
    with pytest.raises(Unfit):
        preflight(settings, job())


def test_off_means_not_at_all(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, tmp_path, edited("fallen off the bus"))
    preflight(settings, job("Off"))


def test_a_pod_that_was_given_more_gpus_than_are_there_is_unfit(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(monkeypatch, tmp_path, edited("healthy, with NVLinks"))
    preflight(settings, job(gpus=2))  # a local run: workers share what the machine has
    (settings.run_dir / "preflight.json").unlink()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(Unfit, match="1 GPUs fewer"):
        preflight(settings, job(gpus=2))


def test_what_can_not_be_checked_is_no_fault_of_the_node(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCKSTEP_NVML_ANSWERS", str(tmp_path / "nowhere.json"))
    preflight(settings, job())
    assert "could not be made (exit code 2)" in caplog.text


def test_gpus_that_hold_whoever_asks_are_a_finding(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable} -S\nimport time\ntime.sleep(600)\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setitem(checks.SECONDS, "Quick", 0.1)
    with pytest.raises(Unfit, match="do not answer"):
        preflight(replace(settings, termination_log=None), job())


@pytest.mark.parametrize(
    ("error", "code", "users", "looks"),
    [
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", 1, False, True),
        ("DistBackendError: NCCL error: unhandled system error", 1, False, True),
        ("RuntimeError: NCCL communicator was aborted", policy.PEER_LOST_EXIT, False, False),  # another worker's fault
        ("torch.OutOfMemoryError: CUDA out of memory", 1, False, False),
        ("IndexError: list index out of range", 1, False, False),
        ("trainer.recipe.loss: cublas is no module", policy.USER_ERROR_EXIT, True, False),
        (None, -9, False, False),
    ],
)
def test_which_ends_of_a_worker_have_its_node_looked_at(error: str | None, code: int, users: bool, looks: bool) -> None:
    end = events.WorkerEnded(Term(1, 1), 0, code, 0.0, error, users)
    assert agent._of_the_device(end) is looks


def test_a_node_is_looked_at_again_however_recently_it_was_checked_but_not_where_checks_are_off(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(monkeypatch, tmp_path, edited("healthy, with NVLinks"))
    preflight(settings, job())
    answered(monkeypatch, tmp_path, edited("ecc error"))
    with pytest.raises(Unfit, match="uncorrectable memory errors"):
        asyncio.run(checks.look_again(settings, job("Full")))
    assert settings.termination_log is not None
    assert "uncorrectable memory errors" in settings.termination_log.read_text()
    asyncio.run(checks.look_again(settings, job("Off")))


def test_gpus_are_known_by_what_the_checks_have_read(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.devices(settings) == ()
    answered(monkeypatch, tmp_path, edited("healthy, with NVLinks"))
    preflight(settings, job())
    (device,) = checks.devices(settings)
    assert device.startswith("serial ")
    assert "GPU-" in device
