"""Ring replay in whole workers: a fault that comes and goes leaves no trace in the run, and a line in its journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forked import rendezvous_store, worker_folders
from lockstep_trainer.injection.bitflips import VARIABLE, Fault
from lockstep_trainer.steprecord import StepReader
from staged import run_kept, small_job

STEPS = 6
FAULT: dict[str, Any] = {
    "rank": 1, "site": "activation", "layer": 1, "bit": 22, "element": 3, "rate": 0.3, "when": "step", "seed": 178,
}  # fmt: skip


def run(
    root: Path, port: int, corruption: dict[str, Any]
) -> tuple[list[tuple[int, float, float]], list[dict[str, Any]]]:
    """Step, loss and gradient norm of each step, and what the journal says of corruption."""
    meeting = {"host": "127.0.0.1", "port": port, "prefix": root.name}
    job = small_job(root, STEPS, {"corruption": corruption})
    folders = worker_folders(root, job, ranks=2, port=port, rendezvous=meeting)
    assert run_kept(folders) == [0, 0], (folders[0] / "output.log").read_text()
    steps = [(each.step, each.loss, each.grad_norm) for each in StepReader(folders[0] / "steps").new_records()]
    lines = [json.loads(line) for line in (folders[0] / "events.jsonl").read_text().splitlines()]
    return steps, [line for line in lines if line["kind"] == "corruption"]


def test_a_rejected_step_leaves_the_run_as_it_would_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Fault(**FAULT).stream()
    assert [stream.random() < FAULT["rate"] for _ in range(4)] == [False, True, False, False], "it strikes in step 2"
    with rendezvous_store() as port:
        expected, nothing = run(tmp_path / "clean", port, {"action": "Off"})
        assert nothing == []
        monkeypatch.setenv(VARIABLE, json.dumps([FAULT]))
        spoiled, unseen = run(tmp_path / "off", port, {"action": "Off"})
        found, lines = run(tmp_path / "report", port, {"action": "Report", "sample": 1.0})
    assert spoiled != expected
    assert unseen == []
    assert found == expected
    assert lines[0]["step"] == 2
    for line in lines:
        (verdict,) = line["verdicts"]
        assert line["rejected"]
        assert (verdict["kind"], verdict["ranks"]) == ("intermittent", [1])
        assert verdict["point"] == "blocks.1.ffn.down (forward, stage 0)"
