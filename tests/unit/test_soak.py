"""The soak's pure parts: what grows is found and what is flat is not accused, and the deck strikes whom it may."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from checker.check import Verdict
from lockstep_api.v1alpha1 import TrainingJob
from soak.campaign import Plan, Progress, Soaked
from soak.deck import (
    AGENT_KILLED,
    DRAIN,
    KINDS,
    OF_NODES,
    OPERATOR_KILLED,
    WORKER_KILLED,
    Card,
    Deck,
    Seat,
    Spared,
    aim,
)
from soak.harm import Blow
from soak.picture import draw
from soak.readings import Nodes, Reading
from soak.result import judge, result, table
from soak.slopes import Growth, slope


def process(
    begins: float, length: float, level: float, per_minute: float, *, noise: float, seed: int
) -> list[tuple[float, float]]:
    """A process that is read every 5 s."""
    dice = random.Random(seed)
    times = [begins + 5 * n for n in range(int(length / 5))]
    return [(t, level + per_minute * (t - begins) / 60 + dice.gauss(0, noise)) for t in times]


def test_a_leak_shows_across_processes_of_different_levels() -> None:
    leaks = {str(n): process(n * 400, 400, 50 + 10 * n, 0.3, noise=0.5, seed=n) for n in range(4)}
    found = slope(leaks, warm_up=60, block=30)
    assert found is not None
    assert found.per_ten_minutes == pytest.approx(3.0, abs=0.6)
    assert abs(found.per_ten_minutes - 3.0) < 1.5 * found.uncertainty
    assert found.beside(1.0) == Growth.GROWS
    assert found.processes == 4


def test_processes_that_replace_each_other_at_rising_levels_do_not_grow() -> None:
    """Each new one is larger than the one before, none grows by itself: an ordinary fit would call it a leak."""
    rising = {str(n): process(n * 600, 600, 50 + 10 * n, 0.0, noise=0.2, seed=n) for n in range(4)}
    found = slope(rising, warm_up=60, block=30)
    assert found is not None
    assert found.beside(1.0) == Growth.NONE


def test_what_a_young_process_takes_is_no_growth() -> None:
    young = [(t, 50 + min(t, 120) / 4) for t in range(0, 1200, 5)]
    assert slope({"a": young}, warm_up=0, block=30).beside(1.0) == Growth.GROWS  # type: ignore[union-attr]
    assert slope({"a": young}, warm_up=150, block=30).beside(1.0) == Growth.NONE  # type: ignore[union-attr]


def test_what_is_too_short_is_not_judged() -> None:
    assert slope({"a": process(0, 100, 50, 5, noise=0.1, seed=1)}, warm_up=60, block=30) is None
    assert slope({}, warm_up=0, block=30) is None


def test_a_restless_line_is_undecided() -> None:
    found = slope({"a": process(0, 200, 50, 0.1, noise=10, seed=3)}, warm_up=0, block=20)
    assert found is not None
    assert found.beside(1.0) == Growth.UNKNOWN


def leaking() -> list[Reading]:
    """Five minutes in which the agent opens a descriptor with every reading, and nothing else changes."""
    return [
        Reading(
            5.0 * n, role, role, duty="works", node="node0", pod_uid="uid", memory=50.0,
            descriptors=10 + (n if role == "agent" else 0), threads=4,
        )
        for n in range(60)
        for role in ("operator", "agent")
    ]  # fmt: skip


def test_each_value_of_each_part_is_judged_by_itself() -> None:
    growth = {(each.role, each.value): each.growth for each in judge(leaking(), Plan(1, 3.0))}
    assert [key for key, value in growth.items() if value != Growth.NONE] == [("agent", "descriptors")]
    assert growth["agent", "descriptors"] == Growth.GROWS


def test_every_kind_comes_once_before_any_comes_twice() -> None:
    deck = Deck(7, 20)
    kinds = [card.kind for _ in range(2 * len(KINDS)) if (card := deck.draw(lambda kind: True))]
    assert sorted(kinds[: len(KINDS)]) == sorted(kinds[len(KINDS) :]) == sorted(KINDS)


def test_a_kind_that_does_not_fit_keeps_its_turn() -> None:
    deck = Deck(7, 20)
    without = [card.kind for _ in range(len(KINDS) - len(OF_NODES)) if (card := deck.draw(lambda k: k not in OF_NODES))]
    assert not set(without) & set(OF_NODES)
    waited = [card.kind for _ in OF_NODES if (card := deck.draw(lambda kind: True))]
    assert sorted(waited) == sorted(OF_NODES)
    assert deck.draw(lambda kind: False) is None


def test_gaps_are_as_long_as_they_should_be_on_average_and_the_same_for_a_seed() -> None:
    gaps = [Deck(3, 20.0).gap() for _ in range(2)]
    assert gaps[0] == gaps[1]
    deck = Deck(3, 20.0)
    assert sum(deck.gap() for _ in range(2000)) / 2000 == pytest.approx(20, rel=0.1)


PODS = [Seat("job-0", "u0", "node0", 0), Seat("job-1", "u1", "node1", 1), Seat("job-2", "u2", "node2")]
OPERATORS = [Seat("op-a", "ua", "node0"), Seat("op-b", "ub", "node1")]


@pytest.mark.parametrize("choice", [0.0, 0.49, 0.51, 0.999])
def test_the_spared_node_is_left_alone_by_all_but_workers(choice: float) -> None:
    spared = Spared("node0", "op-a")
    for kind in (AGENT_KILLED, DRAIN):
        assert aim(Card(kind, 0, choice), PODS, OPERATORS, "op-a", spared) == PODS[1]
    assert aim(Card(OPERATOR_KILLED, 0, choice), PODS, OPERATORS, "op-a", spared) == OPERATORS[1]
    assert aim(Card(WORKER_KILLED, 0, choice), PODS, OPERATORS, "op-a", spared) == PODS[0 if choice < 0.5 else 1]


def test_the_operator_that_works_is_struck_and_not_the_one_that_waits() -> None:
    assert aim(Card(OPERATOR_KILLED, 0, 0.0), PODS, OPERATORS, "op-b", Spared()) == OPERATORS[1]


def test_nobody_is_struck_where_nobody_is() -> None:
    assert aim(Card(AGENT_KILLED, 0, 0.5), PODS[2:], OPERATORS, "op-a", Spared()) is None
    assert aim(Card(AGENT_KILLED, 0, 0.5), PODS[:1], OPERATORS, "op-a", Spared("node0", "op-a")) is None


def test_what_a_soak_showed_is_told_in_full(tmp_path: Path) -> None:
    plan, nodes = Plan(1, 3.0), Nodes(0.0, cgroups=15, mounts=100)
    spec = {
        "nodes": 2,
        "gpusPerNode": 1,
        "command": ["true"],
        "template": {"spec": {"containers": [{"name": "trainer"}]}},
    }
    job = TrainingJob.model_validate(
        {
            "apiVersion": "lockstep.dev/v1alpha1",
            "kind": "TrainingJob",
            "metadata": {"name": "soak", "namespace": "default", "uid": "u"},
            "spec": spec,
            "status": {"phase": "Succeeded", "goodput": 0.5, "ledger": {"productive": 90.0}, "restarts": {"pod": 1}},
        }
    )
    soaked = Soaked(
        plan, 200.0, [Blow(3.0, WORKER_KILLED, "rank 0", 7, 0), Blow(9.0, DRAIN, "", 9, 0, missed="nobody")],
        Spared("node0", "op-a"), [Progress(5.0, 7, "Running", 0.5)], leaking(), nodes,
        Nodes(200.0, cgroups=18, mounts=100), job, Verdict(steps=108), [{"seconds": {"detect": 1.0, "restart": 2.0}}],
    )  # fmt: skip
    judged = judge(soaked.readings, plan)
    shown = result(soaked, judged)
    assert (shown["faults"], shown["missed"], shown["goodput"], shown["recovery_seconds_median"]) == (1, 1, 0.5, 3.0)
    assert ["descriptors of the agent grow" in shown["problems"][0], "3 cgroups are left" in shown["problems"][1]] == [
        True
    ] * 2
    assert len(shown["problems"]) == 2
    assert json.loads(json.dumps(shown)) == shown
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(table(shown))
    assert "descriptors of the agent" in console.export_text()
    draw(soaked, tmp_path / "soak.svg")
    assert (tmp_path / "soak.svg").read_text().startswith("<?xml")
