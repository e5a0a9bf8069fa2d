"""What a command shows of others' text is that text: nothing in it is taken for markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.table import Table

from lockstep_api.v1alpha1 import TrainingJobStatus
from lockstep_cli import checkpoints, live, statustable
from lockstep_cli.__main__ import main
from lockstep_cli.output import Output
from unit.cli.test_explain import FAULT, NOW, make_job

STRANGE = "no [bold]user[/] says [/INST] :smile:"


def test_strings_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output.open("text")
    table = Table()
    table.add_row(STRANGE)
    output.note(STRANGE)
    output.result({}, STRANGE)
    output.result({}, table)
    output.errors.print(STRANGE, soft_wrap=True)
    told = capsys.readouterr()
    assert told.out.count(STRANGE) == 3
    assert told.err == f"{STRANGE}\n"


def test_what_a_job_failed_of_is_told_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z", "message": STRANGE}
    job = make_job(phase="Failed", conditions=[failed])
    (tmp_path / "status.json").write_text(json.dumps(job.to_wire()))
    assert main(["why", str(tmp_path)]) == 0
    assert STRANGE in capsys.readouterr().out


def test_a_fault_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    status = TrainingJobStatus.model_validate({"phase": "Running", "faults": [{**FAULT, "node": "[/INST]"}]})
    live.Lines(Output.open("text").note, started=0.0).show(status, 1.0)
    assert "(node [/INST])" in capsys.readouterr().out


def test_the_phase_is_the_word_itself(capsys: pytest.CaptureFixture[str]) -> None:
    Output.open("text").result({}, statustable.table(make_job(phase="Failed"), NOW))
    assert capsys.readouterr().out.splitlines()[1].split() == ["phase", "Failed"]


def test_a_progress_bar_shows_what_it_is_for_as_it_is() -> None:
    bar = checkpoints._bar(Output.open("text"))
    bar.disable = False
    bar.add_task(STRANGE)
    with bar.console.capture() as shown:
        bar.console.print(bar.make_tasks_table(bar.tasks))
    assert STRANGE in shown.get()
