"""What a detector said of a scenario, beside the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep_trainer.stragglers.work import Ended, Finding
from stragglers.scenarios.scenario import Expected, Scenario

LATE = 20  # steps after its end in which a finding still counts: it was on its way
OVER = 50  # steps before the scenario's end: what ended until then can be said to be over


@dataclass(frozen=True, slots=True)
class Heard:
    """A finding and the executed step, counted from 0, after which it was said."""

    finding: Finding
    executed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one scenario."""

    name: str
    kind: str
    scored: bool
    expected: int
    right: int = 0
    """Found, the right ranks named by a right cause."""
    miscaused: int = 0
    """Found, the right ranks named by another cause."""
    false: int = 0
    """Findings that name others, or come too early or too late."""
    blamed: int = 0
    """Findings that would put hardware aside which is not slow."""
    delays: tuple[int, ...] = ()
    """Steps from the onset to the verdict, 0 where it came on the ramp; of all that were found."""
    ended: int = 0
    """Of ``endings``: said to be over."""
    endings: int = 0
    """Found, and over 50 steps or more before the scenario's end."""
    steps: int = 0
    probes: int = 0
    notes: tuple[str, ...] = ()
    """What was false, missed or miscaused."""

    @property
    def found(self) -> int:
        """By whatever cause."""
        return self.right + self.miscaused


class _Truth:
    """One scenario's, and which of the findings belong to which part of it."""

    def __init__(self, scenario: Scenario, heard: Sequence[Heard]) -> None:
        self.scenario, self.heard = scenario, heard

    def right(self, expected: Expected) -> list[Heard]:
        """Findings of a right cause that name its ranks, all or some, and no others but those of another truth."""
        return [each for each in self.heard if self._in_time(expected, each) and self._right(expected, each.finding)]

    def miscaused(self, expected: Expected) -> list[Heard]:
        """Findings of another cause that name its ranks; some of them, where hardware was slow and is blamed."""
        return [each for each in self.heard if self._in_time(expected, each) and self._other(expected, each.finding)]

    @staticmethod
    def _in_time(expected: Expected, heard: Heard) -> bool:
        return expected.begins <= heard.executed <= (math.inf if expected.ends is None else expected.ends + LATE)

    def _right(self, expected: Expected, finding: Finding) -> bool:
        if finding.cause not in expected.causes:
            return False
        if not expected.ranks:
            return self._all_or_none(finding)
        same = [each.ranks for each in self.scenario.expected if finding.cause in each.causes]
        named = set(finding.ranks)
        return bool(named & expected.ranks) and named <= frozenset().union(*same)

    def _other(self, expected: Expected, finding: Finding) -> bool:
        if finding.cause in expected.causes:
            return False
        if not expected.ranks:
            return self._all_or_none(finding)
        named = set(finding.ranks)
        some = expected.any_part or (finding.cause.blames_node and any(cause.blames_node for cause in expected.causes))
        return named == expected.ranks or (some and bool(named) and named <= expected.ranks)

    def _all_or_none(self, finding: Finding) -> bool:
        return len(finding.ranks) in (0, len(self.scenario.places))


def judge(scenario: Scenario, heard: Sequence[Heard], over: Sequence[Ended], steps: int, probes: int) -> Outcome:
    """The words said in ``steps`` executed steps, with so many ``probes``."""
    truth = _Truth(scenario, heard)
    notes: list[str] = []
    right = miscaused = blamed = ended = endings = 0
    delays: list[int] = []
    belonging: list[Heard] = []
    for expected in scenario.expected:
        good, other = truth.right(expected), truth.miscaused(expected)
        belonging += good + other
        told = _complete(expected, good)
        if told is not None:
            right += 1
        else:
            told = _complete(expected, other)
            if told is None:
                notes.append(f"missed: {_truth(expected)}")
                continue
            miscaused += 1
            blamed += told.finding.cause.blames_node and not any(cause.blames_node for cause in expected.causes)
            notes.append(f"miscaused: {_words(told)}, was {_truth(expected)}")
        delays.append(max(0, told.executed - expected.onset))
        if expected.ends is not None and expected.ends <= steps - OVER:
            endings += 1
            ended += any(one.finding == each.finding for one in over for each in good + other)
    false = [each for each in heard if not any(each is one for one in belonging)]
    return Outcome(
        name=scenario.name,
        kind=scenario.kind,
        scored=scenario.scored,
        expected=len(scenario.expected),
        right=right,
        miscaused=miscaused,
        false=len(false),
        blamed=blamed + sum(each.finding.cause.blames_node for each in false),
        delays=tuple(delays),
        ended=ended,
        endings=endings,
        steps=steps,
        probes=probes,
        notes=(*notes, *(f"false: {_words(each)}" for each in false)),
    )


def _complete(expected: Expected, said: Sequence[Heard]) -> Heard | None:
    """The finding with which all that is to be named was named."""
    named: set[int] = set()
    for each in said:
        named |= set(each.finding.ranks)
        if named >= expected.ranks or expected.any_part:
            return each
    return None


def _words(heard: Heard) -> str:
    found = heard.finding
    return f"{found.cause} of {_ranks(found.ranks)} after {heard.executed} ({found.slowdown:.0%})"


def _truth(expected: Expected) -> str:
    return f"{'/'.join(sorted(expected.causes))} of {_ranks(sorted(expected.ranks))} from {expected.onset}"


def _ranks(ranks: Sequence[int]) -> str:
    return ",".join(map(str, ranks[:4])) + ("…" if len(ranks) > 4 else "") if ranks else "all"
