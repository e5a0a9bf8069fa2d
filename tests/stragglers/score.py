"""How good is a detector: scenarios told to it, and the sums of what came of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lockstep_trainer.stragglers.work import Ended, Finding, Place, Probe, Probed, Work
from stragglers.outcome import Heard, Outcome, judge
from stragglers.scenarios.scenario import Restart, Scenario, Step

PROBES = 50  # at one boundary; who asks for more never ends

Said = Sequence[Probe | Finding | Ended]


class Searcher(Protocol):
    """What can be scored: the detector, its peer, an oracle."""

    def step(self, number: int, work: Sequence[Work], seconds: float) -> Said:
        """A step is done."""

    def probed(self, answer: Probed) -> Said:
        """A probe is done."""

    def restart(self, places: Sequence[Place]) -> Sequence[Ended]:
        """A new generation begins."""


Make = Callable[[Sequence[Place], float], Searcher]
"""From places and threshold."""


def play(make: Make, scenario: Scenario, items: Iterable[Step | Restart] | None = None) -> Outcome:
    """A scenario told to a new searcher, whose probes are answered; ``items``, where they have been drawn before."""
    searcher = make(scenario.places, scenario.threshold)
    heard: list[Heard] = []
    over: list[Ended] = []
    probes, executed = 0, -1
    for item in scenario.run() if items is None else items:
        if isinstance(item, Restart):
            over += searcher.restart(item.places)
            continue
        executed += 1
        said = list(searcher.step(item.number, item.work, item.seconds))
        asked = 0
        while said:
            each = said.pop(0)
            if isinstance(each, Finding):
                heard.append(Heard(each, executed))
            elif isinstance(each, Ended):
                over.append(each)
            else:
                probes, asked = probes + 1, asked + 1
                if asked > PROBES:
                    raise RuntimeError(f"{scenario.name}: more than {PROBES} probes after step {item.number}")
                said += searcher.probed(scenario.answer(each, executed + 1))
    return judge(scenario, heard, over, executed + 1, probes)


@dataclass(frozen=True)
class Score:
    """Of many scenarios."""

    scenarios: int
    expected: int
    found: int
    right: int
    false: int
    blamed: int
    delays: tuple[int, ...] = field(repr=False)
    ended: int
    endings: int
    steps: int
    probes: int

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Score:
        """Their sums."""
        every = list(outcomes)

        def total(name: str) -> int:
            return sum(getattr(outcome, name) for outcome in every)

        names = ("expected", "found", "right", "false", "blamed", "ended", "endings", "steps", "probes")
        delays = tuple(sorted(delay for outcome in every for delay in outcome.delays))
        return cls(scenarios=len(every), delays=delays, **{name: total(name) for name in names})

    @property
    def precision(self) -> float | None:
        """Share of what was said that names the right ranks; None where nothing was said."""
        said = self.found + self.false
        return self.found / said if said else None

    @property
    def recall(self) -> float | None:
        """Share of what was to be found whose ranks were named; None where nothing was."""
        return self.found / self.expected if self.expected else None

    @property
    def f1(self) -> float | None:
        """Their harmonic mean; None where nothing was to be said, nor was."""
        both = 2 * self.found + self.false + (self.expected - self.found)
        return 2 * self.found / both if both else None

    @property
    def causes(self) -> float | None:
        """Share of what was found that has a right cause."""
        return self.right / self.found if self.found else None

    def delay(self, share: float) -> int | None:
        """Steps to the verdict, of the lowest ``share`` of all that were found the longest."""
        return self.delays[min(len(self.delays) - 1, int(share * len(self.delays)))] if self.delays else None

    @property
    def median(self) -> float | None:
        """Steps to the verdict."""
        return statistics.median(self.delays) if self.delays else None
