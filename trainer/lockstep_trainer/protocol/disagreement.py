"""A replayed step on which units disagreed, as rank 0 tells of it by a line ``corruption`` in its journal
(``replay.report.journal_line`` writes it). All ranks know the same, since they have agreed on it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Accusation:
    """One verdict of a disagreement."""

    kind: str
    """permanent, intermittent or undecided."""
    ranks: tuple[int, ...]
    confidence: float
    evidence: str
    point: str = ""
    """Where it showed first."""

    @property
    def decided(self) -> bool:
        """It says who is wrong, if only by a group of ranks."""
        return self.kind != "undecided" and bool(self.ranks)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Units computed the same micro-batch to other bits."""

    step: int
    run: int
    """Which computation of the step it was; the first is 1."""
    rejected: bool
    """The step is computed again."""
    calibration: bool
    """At a generation's first step, and of nothing that was doubted before."""
    accusations: tuple[Accusation, ...]

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Disagreement | None:
        """Of a line ``corruption``; None where it is another version's."""
        try:
            accusations = tuple(
                Accusation(
                    kind=str(each["kind"]),
                    ranks=tuple(map(int, each["ranks"])),
                    confidence=float(each["confidence"]),
                    evidence=str(each["evidence"]),
                    point=str(each.get("point", "")),
                )
                for each in line["verdicts"]
            )
            return cls(int(line["step"]), int(line["run"]), bool(line["rejected"]), line["calibration"], accusations)
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank computes."""

    pod: str
    node: str
    device: str = ""
    """Serial number and UUID of its GPU; empty where nobody knows them."""


def culprit(found: Disagreement, places: Mapping[int, Place]) -> Accusation | None:
    """Whom to put aside: the ranks of one pod, those that were wrong most often first. None where nobody can say who
    is wrong, or only that it is among ranks of several pods."""
    named = [
        one
        for one in found.accusations
        if one.decided and len({places[rank].pod if rank in places else "" for rank in one.ranks}) == 1
    ]
    return min(named, key=lambda one: (-one.confidence, one.ranks), default=None)


def distinct(things: Iterable[Thing]) -> tuple[Thing, ...]:
    """Each once, in order."""
    return tuple(dict.fromkeys(things))
