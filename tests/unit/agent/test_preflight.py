"""The agent has its node checked before it offers itself: once for each start of the container, in another process."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu.recordings import edited
from lockstep_api.constants import FINDINGS_FILE
from lockstep_trainer.agent import preflight as checks
from lockstep_trainer.agent.preflight import Unfit, preflight
from lockstep_trainer.agent.settings import Job, Settings


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
