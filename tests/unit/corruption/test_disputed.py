"""The trial with a spare puts pods aside as the leader does, and names by the same rules."""

from __future__ import annotations

import pytest

from corruption.disputed import PER_POD, heard, inquire
from corruption.outcome import outcome
from corruption.trial import Trial
from lockstep_api.messages import Doubt
from lockstep_trainer.injection.bitflips import Fault
from lockstep_trainer.replay.compare import Verdict
from lockstep_trainer.replay.points import Point
from lockstep_trainer.replay.ring import Disagreement

POINT = Point(0, "forward", "blocks.0.ffn", True)


@pytest.mark.parametrize(("struck", "restarts", "aside"), [(2, 2, (1,)), (0, 3, (1, 0))])
def test_the_pod_without_which_ranks_agree_is_named(struck: int, restarts: int, aside: tuple[int, ...]) -> None:
    doubts: list[Doubt | None] = []

    def train(doubt: Doubt | None, there: bool) -> tuple[Disagreement | None, int]:
        doubts.append(doubt)
        wrong = Verdict("undecided", None, (0, 2), POINT, 0.0, "they differ")
        return (Disagreement(1, 1, (wrong,), False, True), 1) if there else (None, 2)

    result = inquire(train, struck=struck, world_size=8)
    assert (result.generations - 1, result.aside, result.ranks, result.kind) == (
        restarts,
        aside,
        (struck,),
        "permanent",
    )
    assert doubts == [None, *[Doubt(1, (str(POINT),))] * restarts]
    assert all(slot == rank // PER_POD for slot, rank in zip(aside, (2, 0), strict=False))


def test_what_comes_once_names_nobody() -> None:
    def train(doubt: Doubt | None, there: bool) -> tuple[Disagreement | None, int]:
        wrong = Verdict("undecided", None, (0, 2), POINT, 0.0, "they differ")
        return (None, 2) if doubt else (Disagreement(1, 1, (wrong,), False, True), 1)

    result = inquire(train, struck=2, world_size=8)
    trial = Trial("it", "dp2-tp2-pp2", "spare", Fault(2, "product"))
    record = {
        "name": "it", "trial": {**_fields(trial), "fault": _fields(trial.fault)}, "strikes": [], "harmed_at": None,
        "equal": True, "heard": heard(result),
    }  # fmt: skip
    assert (result.aside, outcome(record).located) == ((), "undecided")


def _fields(one: object) -> dict[str, object]:
    return {name: getattr(one, name) for name in type(one).__slots__}  # type: ignore[attr-defined]
