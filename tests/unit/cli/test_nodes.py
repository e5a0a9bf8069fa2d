"""`lockstep nodes`: what an administrator reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lockstep_cli import nodes
from lockstep_cli.commands.nodes import seconds
from lockstep_cli.errors import CliError
from lockstep_operator.plan.nodes.exclusion import Limits, decide, exclude
from lockstep_operator.plan.nodes.records import NodeFault, NodeRecord, Records

NOW = 1_700_000_000.0
FAULT = NodeFault(NOW - 3600, "uid", "llama-3-1", "NodeLost", 1.0, hard=True)


def known() -> Records:
    lemon = NodeRecord(tuple(replace(FAULT, at=NOW - 3600 * n) for n in (3, 2, 1)))
    records: Records = {"lemon": lemon, "once": NodeRecord((FAULT,)), "forgiven": NodeRecord((FAULT,), forgiven=NOW)}
    records = exclude(records, "cable", reason="cable is loose", until=NOW + 3600, now=NOW)
    return decide(records, nodes=100, now=NOW, limits=Limits()).records


def said(records: Records) -> str:
    console = Console(width=200, record=True)
    with console.capture() as capture:
        console.print(nodes.table(records, NOW))
    return capture.get()


def test_the_table_has_the_excluded_first_with_until_when_and_why() -> None:
    lines = [line.split() for line in said(known()).splitlines()]
    assert [line[0] for line in lines] == ["NODE", "lemon", "cable", "once"]
    text = said(known())
    assert "until 2023-11-14T23:13:20Z, by administrator: cable is loose" in text
    assert "by its score" in text
    assert "NodeLost" in text


def test_nothing_known_is_said_in_words() -> None:
    assert "Nothing speaks against any node." in said({})


def test_programs_get_scores_faults_and_exclusions() -> None:
    answer = nodes.wire(known(), NOW)
    by_name: dict[str, Any] = {one["node"]: one for one in answer["nodes"]}
    assert (by_name["lemon"]["by"], by_name["lemon"]["score"], len(by_name["lemon"]["faults"])) == ("score", 2.98, 3)
    assert by_name["cable"]["until"] == "2023-11-14T23:13:20Z"
    assert (by_name["forgiven"]["score"], by_name["forgiven"]["excluded"]) == (0, False)


@pytest.mark.parametrize(("text", "length"), [("30m", 1800), ("12h", 43_200), ("7d", 604_800)])
def test_lengths_of_time(text: str, length: float) -> None:
    assert seconds(text) == length


@pytest.mark.parametrize("text", ["", "h", "0h", "12", "1w", "-1h"])
def test_other_lengths_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(CliError, match="30m, 12h or 7d"):
        seconds(text)
