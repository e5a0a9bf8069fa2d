"""How `lockstep run` begins: the run's folder, and what must be there before anything is written into it; and how it
ends where nobody reads what it says."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_cli import store
from lockstep_cli.__main__ import main
from lockstep_cli.commands import run
from lockstep_cli.commands.run import prepare
from lockstep_cli.errors import CliError
from lockstep_cli.output import Output
from unit.cli.test_manifest import GOOD


def job(checkpoints: str) -> TrainingJob:
    return TrainingJob.model_validate({**GOOD, "spec": {**GOOD["spec"], "checkpoint": {"uri": checkpoints}}})


def test_the_folders_are_made_where_the_uri_says(tmp_path: Path) -> None:
    prepare(job(f"file://{tmp_path}/my%20checkpoints"), tmp_path / "run")
    assert (tmp_path / "run" / "status.json").is_file()
    assert (tmp_path / "my checkpoints").is_dir()
    assert list(store.open_uri(f"file://{tmp_path}/my%20checkpoints").list("")) == []


def test_a_folder_is_used_once(tmp_path: Path) -> None:
    prepare(job(f"file://{tmp_path}/ck"), tmp_path / "run")
    with pytest.raises(CliError, match=r"holds another run .*; give a new folder"):
        prepare(job(f"file://{tmp_path}/ck"), tmp_path / "run")


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_file_is_no_folder_of_a_run(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CliError, match=f"--workdir {tmp_path}/file{below}: no folder can be made there"):
        prepare(job(f"file://{tmp_path}/ck"), tmp_path / f"file{below}")


def test_what_can_not_start_does_not_use_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(GOOD))
    command = ["run", str(tmp_path / "job.yaml"), "--workdir", str(tmp_path / "run"), "--set"]
    uri = f"file://{tmp_path}/file/ck"
    assert main([*command, f"checkpoint.uri={uri}"]) == 1
    assert f"lockstep: checkpoint.uri: {uri}: no folder can be made there (Not a dir" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lockstep_operator", None)
    assert main([*command, f"checkpoint.uri=file://{tmp_path}/ck"]) == 1
    assert "install lockstep[operator,trainer]" in capsys.readouterr().err
    assert not (tmp_path / "run" / "status.json").exists()


def test_a_run_that_nobody_reads_is_ended_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    async def start(on_status: Callable[[TrainingJobStatus], None]) -> TrainingJobStatus:
        try:
            on_status(TrainingJobStatus.model_validate({"phase": "Running"}))
            await asyncio.sleep(60)
        finally:
            on_status(TrainingJobStatus.model_validate({"phase": "Pending"}))
            await asyncio.sleep(0)  # processes are waited for
            ended.append("all")
        return TrainingJobStatus()

    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Output, "note", gone)
    with pytest.raises(BrokenPipeError):
        asyncio.run(run._run(start, job("s3://ck"), Output.open("text")))
    assert ended == ["all"]
