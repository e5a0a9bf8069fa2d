"""A run that was stopped by Ctrl-C is over: every command says so, and how to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep_api.v1alpha1 import TrainingJob
from lockstep_cli import interruption, target, times
from lockstep_cli.__main__ import main
from lockstep_trainer.checkpoint.chain import Chain
from lockstep_trainer.storage import open_store
from unit.cli.test_manifest import GOOD
from unit.storage.test_chain import ONE, listing

START = times.parse("2026-01-01T00:00:00Z")
AT = "2026-01-01T00:00:08Z"


def left(folder: Path, checkpoints: str, **changes: Any) -> TrainingJob:
    """The folder of a run whose processes were just ended, eight seconds behind its start."""
    status = {"phase": "Running", "startTime": "2026-01-01T00:00:00Z", "progress": {"step": 9, "at": AT}, **changes}
    spec = {**GOOD["spec"], "checkpoint": {"uri": checkpoints}}
    metadata = {"name": "a", "namespace": "default", "uid": "u"}
    job = TrainingJob.model_validate({"metadata": metadata, "spec": spec, "status": status})
    (folder / target.JOB_FILE).write_text(json.dumps(job.to_wire()))
    return job


def test_every_command_knows_that_it_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "s3://ck/default/a/u/step-8-e1-g1/manifest.json"
    durable = {"step": 8, "uri": uri, "at": AT}
    left(tmp_path, "s3://ck", checkpoint={"durable": durable, "memory": {"step": 9, "at": AT}})
    (tmp_path / "pods").mkdir()
    (tmp_path / "pods" / "a-0-0.log").write_text("hello\n")
    how = (
        "The run was interrupted. Its newest checkpoint is of step 8; to go on from there, start it again with another "
        f"--workdir and --set checkpoint.resumeFrom={uri}"
    )
    assert interruption.record(tmp_path, START + 10) == how
    status = target.load_local(tmp_path).status
    assert (status.phase, status.ready, status.checkpoint.memory) == ("Failed", "0/2", None)
    assert main(["why", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == f"Failed after 10 s at step 9. {how}."
    assert main(["logs", str(tmp_path), "--follow"]) == 0  # it ends
    assert capsys.readouterr().out == "hello\n"
    assert main(["profile", str(tmp_path)]) == 1
    assert "has ended (Failed)" in capsys.readouterr().err


def test_a_checkpoint_that_the_status_has_not_heard_of_is_named(tmp_path: Path) -> None:
    """Those before it may have been removed for it."""
    uri = (tmp_path / "ck").as_uri()
    left(tmp_path, uri, checkpoint={"durable": {"step": 8, "uri": "file:///gone/manifest.json", "at": AT}})
    chain = Chain(open_store(f"{uri}/default/a/u"))
    chain.fence(ONE, "test")
    chain.commit(listing(12), ONE, "test")
    said = interruption.record(tmp_path, START + 10)
    assert said.endswith(f"checkpoint.resumeFrom={uri}/default/a/u/step-12-e1-g1/manifest.json")
    durable = target.load_local(tmp_path).status.checkpoint.durable
    assert durable is not None
    assert durable.step == 12


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    left(tmp_path, (tmp_path / "ck").as_uri(), phase=None)
    assert interruption.record(tmp_path, START + 10) == (
        "The run was interrupted. It has left no checkpoint; start it again with another --workdir."
    )


def test_an_end_of_its_own_stays(tmp_path: Path) -> None:
    before = left(tmp_path, "s3://ck", phase="Succeeded")
    assert interruption.record(tmp_path, START + 10) == ""
    assert target.load_local(tmp_path) == before
