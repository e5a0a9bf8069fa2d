"""Commands end with the right exit status and one sentence, for people and for programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lockstep_api.v1alpha1 import TrainingJobStatus
from lockstep_cli import live, locallogs
from lockstep_cli.__main__ import main
from unit.cli.test_manifest import GOOD


@pytest.fixture
def good(tmp_path: Path) -> str:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    return str(file)


def test_validate_accepts(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", good]) == 0
    assert "4 GPUs" in capsys.readouterr().out


def test_validate_says_on_how_many_nodes_an_elastic_job_can_train(
    good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["nodes=4", "gpusPerNode=1", "resilience.elastic.minNodes=1", "trainer.recipe.globalBatchTokens=24576"]
    words = [word for change in changes for word in ("--set", change)]
    assert main(["validate", good, *words, "--set", "trainer.data.sequenceLength=2048"]) == 0
    assert "it can train on 1, 2, 3, 4 nodes" in capsys.readouterr().out


def test_validate_as_json_has_all_defaults(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", good, "--output", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["spec"]["trainer"]["recipe"]["clipGradNorm"] == 1.0


def test_errors_are_one_sentence(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", good, "--set", "nodes=0"]) == 2
    assert capsys.readouterr().err == (
        f"lockstep: {good}: spec.nodes: input should be greater than or equal to 1 (it is 0)\n"
    )


def test_errors_as_json_list_every_problem(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", good, "--set", "nodes=0", "--set", "spares=-1", "--output", "json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_a_folder_that_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", f"{tmp_path}/"]) == 1
    assert "no folder of a local run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "why", "logs", "report"])
def test_a_name_that_is_neither_folder_nor_job_is_said_to_be_neither(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    (tmp_path / "ck").mkdir()
    (tmp_path / "tiny.yaml").touch()
    for name, clause in (
        ("nosuch", "there is no folder nosuch"),
        ("ck", "ck is no folder of a local run (it would hold status.json)"),
        ("tiny.yaml", "tiny.yaml is a file and no folder of a local run"),
    ):
        assert main([command, name]) == 1
        assert capsys.readouterr().err.startswith(f"lockstep: {clause}, and no cluster: ")
    if command != "logs":
        assert main([command, "no/such"]) == 1
        assert capsys.readouterr().err == "lockstep: there is no folder no/such\n"


@pytest.mark.parametrize("command", [["validate"], ["validate", "--output", "json"], ["logs"]])
def test_a_reader_that_goes_away_ends_it_quietly(command: list[str], good: str, tmp_path: Path) -> None:
    """As in `lockstep logs … | head`, whether a line is written at once or waits in a buffer."""
    pods = tmp_path / "run" / "pods"
    pods.mkdir(parents=True)
    (pods / "a-0-0.log").write_text("[rank 0] import\n")
    (pods.parent / "status.json").write_text(json.dumps(GOOD))
    name = good if "validate" in command else str(pods.parent)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "lockstep_cli", *command, name],
            stdout=nobody, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("number", ["0", "-1"])
def test_a_tail_has_a_line(number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(tmp_path), "--tail", number]) == 1
    assert f"--tail {number}: write a number of lines from 1" in capsys.readouterr().err


def test_starting_takes_little() -> None:
    # Every command pays for what is imported: torch, boto3 and the operator must not be among it.
    heavy = ("torch", "boto3", "kopf", "aiohttp")
    code = f"import sys, lockstep_cli.__main__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_lines_without_a_terminal_tell_changes_once() -> None:
    said: list[str] = []
    lines = live.Lines(said.append, started=0.0, every=5.0)
    running = TrainingJobStatus.model_validate({"phase": "Running", "progress": {"step": 4, "steps": 9, "loss": 2.5}})
    for now in (10.0, 12.0, 17.0):
        lines.show(running, now)
    assert said == ["0:10  Running", "0:10  step 4/9, loss 2.500", "0:17  step 4/9, loss 2.500"]


def test_a_fault_is_a_line_once_its_outcome_is_known() -> None:
    said: list[str] = []
    lines = live.Lines(said.append, started=0.0)
    fault = {"at": "2026-01-01T00:00:09Z", "cause": "PodLost", "rung": "pod", "seconds": {"detect": 0.1}}
    for phase in ("Running", "Recovering"):
        lines.show(TrainingJobStatus.model_validate({"phase": phase, "faults": [fault]}), 10.0)
    assert said[-1] == "0:10  Recovering"
    lines.show(TrainingJobStatus.model_validate({"phase": "Failed", "faults": [fault]}), 12.0)
    assert said[-2:] == ["0:12  fault: a pod was lost; the job ends", "0:12  Failed"]
    recovered = fault | {"generation": 2, "stepsLost": 1, "seconds": {"detect": 0.1, "restart": 2.0}}
    lines.show(TrainingJobStatus.model_validate({"phase": "Running", "faults": [recovered]}), 13.0)
    assert "0:13  fault: a pod was lost; a new pod took the slot in 2.1 s, 1 step redone" in said
    two = [fault | {"generation": 3}, fault | {"generation": 4}]
    lines.show(TrainingJobStatus.model_validate({"phase": "Running", "faults": two}), 14.0)
    assert said[-1] == "0:14  fault: a pod was lost; a new pod took the slot"


def test_lines_tell_once_that_training_began_on_other_data() -> None:
    said: list[str] = []
    lines = live.Lines(said.append, started=0.0)
    progress = {"step": 5, "otherData": "up to step 4: source text has other tokens"}
    status = TrainingJobStatus.model_validate({"phase": "Running", "progress": progress})
    for now in (10.0, 11.0):
        lines.show(status, now)
    told = "0:10  trained on other data up to step 4: source text has other tokens"
    assert said == ["0:10  Running", told, "0:10  step 5"]


@pytest.mark.parametrize(("rank", "kept"), [(None, 3), (1, 1), (7, 0)])
def test_logs_of_a_rank(rank: int | None, kept: int) -> None:
    lines = ["agent started", "[step 3 rank 1] loss", "[rank 0] import"]
    assert len(locallogs.Wanted(rank).select(lines)) == kept
