"""A job with a little noise, to which a test does one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lockstep_trainer.stragglers.detector import Detector, Said
from lockstep_trainer.stragglers.settings import Settings
from lockstep_trainer.stragglers.work import Ended, Finding, Place, Probe, Probed, ProbeKind, Work

CLOCK = 1755.0
TOKENS = 8192
SQUARES = 8192 * 1024


@dataclass(slots=True)
class Step:
    """What the ranks do in a step [ranks], before the test changes it."""

    number: int
    compute: np.ndarray
    data: np.ndarray
    host: np.ndarray
    clock: np.ndarray
    squares: np.ndarray
    transfer: float = 0.1
    """Seconds of the transfer of all ranks' group."""
    missing: frozenset[int] = frozenset()


@dataclass(slots=True)
class Slow:
    """What probes find: times that a rank's own take longer."""

    compute: Mapping[int, float] = field(default_factory=dict)
    memory: Mapping[int, float] = field(default_factory=dict)
    link: Mapping[int, float] = field(default_factory=dict)


Change = Callable[[Step], None]


def places(data: int, pipeline: int = 1, per_node: int = 4) -> list[Place]:
    """Ranks of a job: data index first."""
    return [
        Place(rank, f"node-{rank // per_node}", data=rank // pipeline, pipeline=rank % pipeline)
        for rank in range(data * pipeline)
    ]


class Job:
    """Plays steps to a detector, and answers its probes."""

    def __init__(self, ranks: Sequence[Place], threshold: float = 0.1, noise: float = 0.02) -> None:
        self.places = list(ranks)
        self.detector = Detector(self.places, Settings(threshold))
        self.said: list[tuple[int, Said]] = []
        """By number of step."""
        self.slow = Slow()
        self.answers = True
        self._noise = noise
        self._number = 0
        self._random = np.random.default_rng(7)

    def play(self, steps: int, change: Change = lambda _: None) -> None:
        """So many steps more."""
        count = len(self.places)
        for _ in range(steps):
            random, number = self._random, self._number
            step = Step(
                number,
                np.exp(random.normal(0, self._noise, count)),
                random.exponential(0.002, count),
                random.exponential(0.002, count),
                CLOCK * (1 + random.normal(0, 0.003, count)),
                np.full(count, float(SQUARES)),
                0.1 * float(np.exp(random.normal(0, 0.03))),
            )
            change(step)
            own = step.compute + step.data + step.host
            work = [
                Work(
                    place.rank,
                    float(step.compute[at]),
                    float(step.data[at]),
                    float(step.host[at]),
                    {"data": float(own.max() - own[at] + step.transfer)},
                    TOKENS,
                    int(step.squares[at]),
                    float(step.clock[at]),
                )
                for at, place in enumerate(self.places)
                if place.rank not in step.missing
            ]
            self._take(self.detector.step(number, work, float(own.max()) + step.transfer))
            self._number += 1

    def restart(self, ranks: Sequence[Place], at: int) -> None:
        """A new generation that goes on at an earlier step."""
        self.places, self._number = list(ranks), at
        self.said += [(at, one) for one in self.detector.restart(ranks)]

    def findings(self) -> list[Finding]:
        """All that were said."""
        return [one for _, one in self.said if isinstance(one, Finding)]

    def ended(self) -> list[Ended]:
        """All that were said."""
        return [one for _, one in self.said if isinstance(one, Ended)]

    def probes(self, kind: ProbeKind = "compute") -> list[Probe]:
        """All of a kind that were asked for."""
        return [one for _, one in self.said if isinstance(one, Probe) and one.kind == kind]

    def _take(self, said: Sequence[Said]) -> None:
        self.said += [(self._number, one) for one in said]
        for probe in said:
            if isinstance(probe, Probe) and self.answers:
                self._take(self.detector.probed(self.answer(probe)))

    def answer(self, probe: Probe) -> Probed:
        """What is measured now."""

        def noise() -> float:
            return float(np.exp(self._random.normal(0, 0.01)))

        if probe.kind == "link":
            slow = self.slow.link
            return Probed(
                "link", pairs={(a, b): 0.1 * max(slow.get(a, 1), slow.get(b, 1)) * noise() for a, b in probe.pairs}
            )
        slow = self.slow.compute if probe.kind == "compute" else self.slow.memory
        return Probed(probe.kind, ranks={rank: 0.05 * slow.get(rank, 1) * noise() for rank in probe.ranks})
