"""What the leader makes of replayed steps: verdicts, counts, and when a verdict is over."""

from __future__ import annotations

from typing import Any

import pytest

from lockstep_trainer.protocol.corruption import KEPT, Replays
from lockstep_trainer.protocol.disagreement import Disagreement, Place
from lockstep_trainer.replay.compare import Verdict
from lockstep_trainer.replay.points import Point
from lockstep_trainer.replay.report import journal_line
from lockstep_trainer.replay.ring import Disagreement as Told
from lockstep_trainer.replay.sampling import SUSPICIOUS_STEPS

PLACES = {rank: Place(f"pod-{rank // 2}", f"node-{rank // 2}", f"serial {rank}") for rank in range(4)}
POINT = Point(0, "forward", "blocks.0.ffn", True)


def line(step: int, *, kind: Any = "permanent", ranks: tuple[int, ...] = (2,), run: int = 1) -> dict[str, Any]:
    """As a worker writes it."""
    unit = None if kind == "undecided" else ranks[0]
    verdict = Verdict(kind, unit, ranks, POINT, 0.0 if unit is None else 1.0, "unit 2 was outvoted")
    return {"kind": "corruption", "at": 1.0, **journal_line(Told(step, run, (verdict,), False, rejected=run < 2))}


def heard(replays: Replays, told: dict[str, Any], now: float = 10.0) -> Replays:
    found = Disagreement.read(told)
    assert found is not None
    return replays.found(found, PLACES, now)


def test_a_workers_line_becomes_a_verdict_with_pod_node_and_gpu() -> None:
    replays = heard(Replays(), line(7))
    (verdict,) = replays.verdicts
    assert (verdict.kind, verdict.ranks, verdict.pods, verdict.nodes) == ("Permanent", (2,), ("pod-1",), ("node-1",))
    assert (verdict.devices, verdict.since, verdict.confidence) == (("serial 2",), 7, 1.0)
    assert (replays.compared, replays.rejected, replays.accused) == (1, 1, (("Permanent", "node-1", 1),))


def test_the_runs_of_one_step_are_one_finding_and_further_steps_join_it() -> None:
    replays = heard(heard(Replays(), line(7)), line(7, run=2), 11.0)
    assert [(one.seen, one.at) for one in replays.verdicts] == [(1, 10.0)]
    assert (replays.compared, replays.rejected) == (1, 1)
    replays = heard(replays, line(9), 12.0)
    assert [(one.since, one.step, one.seen, one.at) for one in replays.verdicts] == [(7, 9, 2, 10.0)]
    assert replays.accused == (("Permanent", "node-1", 2),)
    replays = heard(replays, line(9, ranks=(0,)), 13.0)
    assert [one.ranks for one in replays.verdicts] == [(2,), (0,)]


def test_a_verdict_is_over_long_after_its_last_disagreement() -> None:
    replays = heard(Replays(), line(7))
    assert replays.stepped(7 + SUSPICIOUS_STEPS, 20.0).verdicts[0].ended is None
    assert replays.stepped(8 + SUSPICIOUS_STEPS, 20.0).verdicts[0].ended == 20.0


def test_a_verdict_is_over_once_its_slot_has_another_pod() -> None:
    replays = heard(Replays(), line(7))
    assert replays.started(PLACES, 20.0) is replays
    moved = {**PLACES, 2: Place("pod-9", "node-9")}
    assert replays.started(moved, 20.0).verdicts[0].ended == 20.0


def test_agreeing_steps_are_counted() -> None:
    assert Replays().agreed().agreed().compared == 2


def test_verdicts_are_remembered_up_to_a_number() -> None:
    replays = Replays()
    for step in range(KEPT + 3):
        replays = heard(replays, line(step, ranks=(step,)))
    assert [one.since for one in replays.verdicts] == list(range(3, KEPT + 3))


@pytest.mark.parametrize(
    "broken", [{}, {"step": 1}, {**line(7), "verdicts": [{"kind": "permanent"}]}, line(7) | {"run": None}]
)
def test_another_versions_line_is_passed_over(broken: dict[str, Any]) -> None:
    assert Disagreement.read(broken) is None
