"""With two units nobody can say which of them is always wrong: a trial in which pods are changed for a spare, as the
leader would do it (``protocol.dispute``), until one is named.

Pods are of two ranks, each of one unit. A pod that is put aside takes its fault with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lockstep_api.messages import Dispute, Doubt
from lockstep_trainer.protocol import dispute
from lockstep_trainer.protocol.corruption import PERSISTENT
from lockstep_trainer.protocol.disagreement import Disagreement, Place, culprit
from lockstep_trainer.replay.report import journal_line
from lockstep_trainer.replay.ring import Disagreement as Found

PER_POD = 2
GENERATIONS = 12
"""So many at most: a pod after the other of all that may be accused, and the first ones."""

Generation = Callable[[Doubt | None, bool], tuple[Found | None, int]]
"""Trains from the beginning. What is doubted, and whether the fault is still there → the first disagreement, or None;
and the last step that was made."""


@dataclass
class Inquiry:
    """What came of it."""

    generations: int = 0
    aside: tuple[int, ...] = ()
    """Slots, in order."""
    ranks: tuple[int, ...] = ()
    """Who is named, or among whom somebody was wrong."""
    kind: str = "undecided"
    step: int = 0
    """The last that disagreed."""


def inquire(train: Generation, *, struck: int, world_size: int) -> Inquiry:
    """Until somebody is named, or there is nothing to try. ``struck``: the rank whose device is wrong. All ranks come
    to the same."""
    result, known, doubts = Inquiry(), _Known(world_size), 0
    for result.generations in range(1, GENERATIONS + 1):
        there = struck // PER_POD not in result.aside
        found, last = train(dispute.doubt(known.dispute) if known.dispute else None, there)
        if found is None:
            verdict = known.agreed(last)
            if verdict:
                result.ranks, result.kind = verdict
            return result
        result.step = found.step
        said = Disagreement.read(journal_line(found))
        assert said is not None
        if who := culprit(said, known.places):
            result.ranks, result.kind = who.ranks, who.kind
            return result
        result.ranks = tuple(rank for each in said.accusations for rank in each.ranks)
        doubts += known.dispute is None
        answer = known.doubted(said, persist=doubts >= PERSISTENT)
        if answer == "give up":
            return result
        if answer != "again":
            result.aside = (*result.aside, answer)
    return result


class _Known:
    """As a leader has it."""

    def __init__(self, world_size: int) -> None:
        self.places = {rank: Place(f"pod-{rank // PER_POD}", f"node-{rank // PER_POD}") for rank in range(world_size)}
        self.dispute: Dispute | None = None

    def doubted(self, said: Disagreement, *, persist: bool) -> dispute.Answer:
        self.dispute, answer = dispute.answer(
            self.dispute,
            said,
            self.places,
            nodes=len(self.places) // PER_POD,
            gpus_per_node=PER_POD,
            spares=1,
            persist=persist,
        )
        if isinstance(answer, int):
            self.dispute = dispute.without(self.dispute, answer, self.places, PER_POD)
            spare = Place(f"spare for {answer}", "spare")
            self.places |= dict.fromkeys(range(answer * PER_POD, (answer + 1) * PER_POD), spare)
        return answer

    def agreed(self, step: int) -> tuple[tuple[int, ...], str] | None:
        if self.dispute is None or step < self.dispute.step:
            return None
        verdict = dispute.verdict(self.dispute, self.places, 0.0)
        return (verdict.ranks, verdict.kind.lower()) if verdict else None


def heard(result: Inquiry) -> list[dict[str, Any]]:
    """As a world tells of what it has heard."""
    if not result.step:
        return []
    verdict = {"kind": result.kind, "unit": None, "ranks": list(result.ranks), "point": ""}
    return [{"step": result.step, "run": 1, "rejected": True, "verdicts": [verdict]}]
