"""Sentinels in whole workers: they change no bit of the run, and tell of what spoils it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forked import rendezvous_store, worker_folders
from lockstep_trainer import sentinels
from lockstep_trainer.injection.bitflips import VARIABLE, Fault
from lockstep_trainer.optim.updatesize import EVERY
from lockstep_trainer.steprecord import StepReader
from staged import run_kept, small_job

STEPS = EVERY + 2  # the update's size is measured, and read
STRUCK = 10
FAULT: dict[str, Any] = {
    "rank": 1, "site": "gradient", "layer": 1, "bit": 30, "element": 3, "rate": 0.05, "seed": 225,
}  # fmt: skip


def run(root: Path, port: int, action: str) -> tuple[list[tuple[int, float, float]], list[Any]]:
    """Step, loss and gradient norm of each step, and what the journal says of unusual figures."""
    job = small_job(root, STEPS, {"sentinels": {"action": action}})
    meeting = {"host": "127.0.0.1", "port": port, "prefix": root.name}
    folders = worker_folders(root, job, ranks=2, port=port, rendezvous=meeting)
    assert run_kept(folders) == [0, 0], (folders[0] / "output.log").read_text()
    steps = [(each.step, each.loss, each.grad_norm) for each in StepReader(folders[0] / "steps").new_records()]
    events = folders[0] / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return steps, [line for line in lines if line["kind"] == "outlier"]


def test_a_watched_run_is_the_run_that_is_not(tmp_path: Path) -> None:
    with rendezvous_store() as port:
        expected, _ = run(tmp_path / "off", port, "Off")
        found, nothing = run(tmp_path / "report", port, "Report")
    assert len(expected) == STEPS
    assert found == expected
    assert nothing == []


def test_what_spoils_a_step_is_a_line_of_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentinels, "WARM", 4)  # workers are forks of this process
    stream = Fault(**FAULT).stream()
    assert [stream.random() < FAULT["rate"] for _ in range(STEPS)].index(True) == STRUCK - 1
    monkeypatch.setenv(VARIABLE, json.dumps([FAULT]))
    with rendezvous_store() as port:
        _, lines = run(tmp_path / "spoilt", port, "Report")
    assert (lines[0]["signal"], lines[0]["step"], lines[0]["ended"]) == ("gradientNorm", STRUCK, False)
    assert "times its median" in lines[0]["evidence"]
