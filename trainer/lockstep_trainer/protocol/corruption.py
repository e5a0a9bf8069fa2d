"""What the leader hears of replayed steps: who computed wrong numbers, and up to which step all was well. Pure.

Rank 0 tells of each replayed step by a line of its own: ``corruption`` where units disagreed, as
``replay.report.journal_line`` writes it, else ``replayed``. All ranks know the same, since they have agreed on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lockstep_api.messages import CorruptVerdict
from lockstep_trainer.replay.sampling import SUSPICIOUS_STEPS

KEPT = 10
"""Verdicts that are remembered."""
PERSISTENT = 3
WINDOW = 20
"""So many disagreements without a culprit among so many replayed steps persist. One or two may be a particle's doing;
with two units the third is a fault that is always there, or one that the next two computations happened to share."""


@dataclass(frozen=True, slots=True)
class Accusation:
    """One verdict of a disagreement."""

    kind: str
    """permanent, intermittent or undecided."""
    ranks: tuple[int, ...]
    confidence: float
    evidence: str

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
    """At a generation's first step."""
    accusations: tuple[Accusation, ...]

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Disagreement | None:
        """Of a line ``corruption``; None where it is another version's."""
        try:
            accusations = tuple(
                Accusation(
                    str(each["kind"]), tuple(map(int, each["ranks"])), float(each["confidence"]), str(each["evidence"])
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


@dataclass(frozen=True, slots=True)
class Replays:
    """What this job's replays have found. Goes with the leader's memory from epoch to epoch."""

    verdicts: tuple[CorruptVerdict, ...] = ()
    compared: int = 0
    """Steps that were replayed, seen by this leader's agents."""
    rejected: int = 0
    """Computations of steps that were dropped."""
    accused: tuple[tuple[str, str, int], ...] = ()
    """Kind of verdict, node, on how many steps."""
    doubts: tuple[int, ...] = ()
    """The last disagreements without a culprit, each by how many steps had been compared."""

    @property
    def persist(self) -> bool:
        """Disagreements without a culprit come again and again."""
        return len(self.doubts) == PERSISTENT and self.compared - self.doubts[0] < WINDOW

    def agreed(self) -> Replays:
        """A step was replayed, and all units agreed."""
        return replace(self, compared=self.compared + 1)

    def found(self, what: Disagreement, places: Mapping[int, Place], now: float) -> Replays:
        """With a disagreement in it. The runs of one step count once."""
        first = what.run == 1
        fresh = replace(self, compared=self.compared + first, rejected=self.rejected + what.rejected)
        if first and not what.calibration and culprit(what, places) is None:
            fresh = replace(fresh, doubts=(*fresh.doubts, fresh.compared)[-PERSISTENT:])
        for accusation in what.accusations:
            fresh = fresh._accused(accusation, what.step, places, now)
        return fresh

    def _accused(self, who: Accusation, step: int, places: Mapping[int, Place], now: float) -> Replays:
        at = [places[rank] for rank in who.ranks if rank in places]
        new = CorruptVerdict(
            kind=who.kind.capitalize(),
            ranks=who.ranks,
            pods=_distinct(place.pod for place in at),
            nodes=_distinct(place.node for place in at),
            devices=tuple(place.device for place in at if place.device),
            since=step,
            step=step,
            seen=1,
            confidence=who.confidence,
            evidence=who.evidence,
            at=now,
        )
        for number, old in enumerate(self.verdicts):
            if old.ended is None and (old.kind, old.ranks, old.pods) == (new.kind, new.ranks, new.pods):
                if step <= old.step:  # another run of the same step
                    return self
                again = replace(new, since=old.since, seen=old.seen + 1, at=old.at)
                verdicts = (*self.verdicts[:number], again, *self.verdicts[number + 1 :])
                break
        else:
            verdicts = (*self.verdicts, new)[-KEPT:]
        counts = {(kind, node): count for kind, node, count in self.accused}
        for node in new.nodes:
            counts[new.kind, node] = counts.get((new.kind, node), 0) + 1
        return replace(self, verdicts=verdicts, accused=tuple((*key, count) for key, count in counts.items()))

    def stepped(self, step: int, now: float) -> Replays:
        """A step was done: who was last found long ago is suspected no more."""
        return self._ended(lambda one: step - one.step > SUSPICIOUS_STEPS, now)

    def started(self, places: Mapping[int, Place], now: float) -> Replays:
        """A generation starts: who is not where it was is judged anew."""
        return self._ended(
            lambda one: one.pods != _distinct(places[rank].pod for rank in one.ranks if rank in places), now
        )

    def _ended(self, over: Callable[[CorruptVerdict], bool], now: float) -> Replays:
        if not any(one.ended is None and over(one) for one in self.verdicts):
            return self
        verdicts = tuple(replace(one, ended=now) if one.ended is None and over(one) else one for one in self.verdicts)
        return replace(self, verdicts=verdicts)


def culprit(found: Disagreement, places: Mapping[int, Place]) -> Accusation | None:
    """Whom to put aside: the ranks of one pod, those that were wrong most often first. None where nobody can say who
    is wrong, or only that it is among ranks of several pods."""
    named = [
        one
        for one in found.accusations
        if one.decided and len({places[rank].pod if rank in places else "" for rank in one.ranks}) == 1
    ]
    return min(named, key=lambda one: (-one.confidence, one.ranks), default=None)


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
