"""Rank 0's reports are passed on once each, whenever the agent dies."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lockstep_api.messages import Term
from lockstep_trainer.agent.worker import Worker


def worker(folder: Path) -> Worker:
    """As an agent has it that has just started."""
    return Worker(folder, Term(1, 1), 0)


def report(folder: Path, number: int) -> None:
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"number": number}) + "\n")


def test_a_new_agent_goes_on_where_the_one_before_was(tmp_path: Path) -> None:
    report(tmp_path, 1)
    assert worker(tmp_path).reports() == [{"number": 1}]
    report(tmp_path, 2)
    assert worker(tmp_path).reports() == [{"number": 2}]


def test_the_position_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """An agent that is killed while it writes leaves the old one."""
    report(tmp_path, 1)
    first = worker(tmp_path)
    first.reports()
    os.link(tmp_path / "events.position", tmp_path / "before")
    said = (tmp_path / "before").read_text()
    report(tmp_path, 2)
    first.reports()
    assert (tmp_path / "before").read_text() == said


def test_an_empty_position_keeps_no_agent_from_starting(tmp_path: Path) -> None:
    report(tmp_path, 1)
    (tmp_path / "events.position").touch()
    assert worker(tmp_path).reports() == [{"number": 1}]
