"""The tuning set: seeded jobs with one fault each, or none. Thresholds are frozen on it, and nothing is scored on it.

A step is computed for all ranks, then the collectives: first tensor, then context, pipeline and data groups wait for
their last rank and transfer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lockstep_trainer.stragglers.work import Cause, Place, Probe, Probed, Work

TOKENS = 8192
CLOCK = 1755.0
"""Of an H100 under load, MHz."""
ORDER = ("tensor", "context", "pipeline", "data")
TRANSFER = {"tensor": 0.06, "context": 0.04, "pipeline": 0.03, "data": 0.1}
"""Seconds of transfers in a step of about a second."""
KINDS = (
    "Clock", "Memory", "Compute", "Host", "Network", "Data", "sparse data", "shared data", "Pauses",
    "PipelineImbalance", "LengthImbalance", "slow node", "ramp", "clean", "burst", "lengths vary", "evaluation",
    "mild Clock", "mild Compute", "mild Host", "mild PipelineImbalance", "mild LengthImbalance", "mild Pauses",
)  # fmt: skip
MILD = 0.75
"""Share of the threshold up to which nothing is to be said: what happens in a mild scenario is not to be found."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A job's layout, and how it behaves when it is well."""

    data: int = 8
    pipeline: int = 1
    tensor: int = 1
    noise: float = 0.02
    spikes: float = 0.003
    """Share of a rank's steps that take much longer by chance."""
    tokens: float = 0.0
    """Spread of ranks' tokens in a step."""
    varied: float = 0.0
    """Spread of documents' lengths: 0 for equal ones."""
    attention: float = 0.2
    """Share of attention in a step with usual lengths."""
    clocks: bool = True

    def places(self) -> list[Place]:
        """Eight ranks a node, tensor groups within it."""
        ranks = [
            (data, stage, tensor)
            for data in range(self.data)
            for stage in range(self.pipeline)
            for tensor in range(self.tensor)
        ]
        per_node = 8 if len(ranks) > 8 else max(1, len(ranks) // 2)
        return [
            Place(rank, f"node-{rank // per_node}", data=data, pipeline=stage, tensor=tensor)
            for rank, (data, stage, tensor) in enumerate(ranks)
        ]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A job with what happens to it."""

    kind: str
    seed: int
    shape: Shape
    size: float = 0.0
    """0.3 makes the part 30 % longer."""
    onset: int = 0
    end: int = 10**9
    steps: int = 220
    ranks: tuple[int, ...] = ()
    """Whom it happens to."""
    threshold: float = 0.1
    probe_noise: float = 0.01

    @property
    def happens(self) -> str:
        """What goes on, mild or not."""
        return self.kind.removeprefix("mild ")

    @property
    def causes(self) -> frozenset[Cause]:
        """Right answers: without its clock a device that is slow by it is only known to compute slowly."""
        if self.expected is Cause.CLOCK and not self.shape.clocks:
            return frozenset({Cause.COMPUTE})
        return frozenset() if self.expected is None else frozenset({self.expected})

    @property
    def expected(self) -> Cause | None:
        """The cause to be found."""
        named = {"sparse data": Cause.DATA, "shared data": Cause.DATA, "slow node": Cause.CLOCK, "ramp": Cause.CLOCK}
        if self.kind in named:
            return named[self.kind]
        return Cause(self.kind) if self.kind in set(Cause) else None


@dataclass(slots=True)
class Trace:
    """A scenario as it happens."""

    scenario: Scenario
    places: list[Place] = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.places = self.scenario.shape.places()
        self._random = np.random.default_rng(self.scenario.seed)
        ranks = len(self.places)
        self._spread = np.exp(self._random.normal(0, 0.007, ranks))
        self._probe_spread = np.exp(self._random.normal(0, 0.005, ranks))
        self._nodes = sorted({place.node for place in self.places})
        self._node_of = np.array([self._nodes.index(place.node) for place in self.places])
        self._drift = np.zeros(len(self._nodes))
        self._groups: dict[str, list[np.ndarray]] = {}
        for dimension in ORDER:
            groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for place in self.places:
                groups[tuple(getattr(place, o) for o in ORDER if o != dimension)].append(place.rank)
            self._groups[dimension] = [np.array(group) for group in groups.values() if len(group) > 1]

    _random: np.random.Generator = field(init=False)
    _spread: np.ndarray = field(init=False)
    _probe_spread: np.ndarray = field(init=False)
    _nodes: list[str] = field(init=False)
    _node_of: np.ndarray = field(init=False)
    _drift: np.ndarray = field(init=False)
    _groups: dict[str, list[np.ndarray]] = field(init=False)

    def severity(self) -> np.ndarray:
        """How much longer [ranks] the fault's part takes now."""
        one = self.scenario
        severity = np.zeros(len(self.places))
        if one.onset <= self.step < one.end:
            share = min(1.0, (self.step - one.onset + 1) / 40) if one.kind == "ramp" else 1.0
            severity[list(one.ranks)] = one.size * share
        return severity

    def steps(self) -> Iterator[tuple[int, list[Work], float]]:
        """Number, work and time of each step."""
        for step in range(self.scenario.steps):
            self.step = step
            yield step, *self._step()

    def _lengths(self, severity: np.ndarray) -> np.ndarray:
        """Σ length² [ranks]: ranks of one data index compute the same documents."""
        one, shape = self.scenario, self.scenario.shape
        base = TOKENS * 1024.0
        by_data = np.full(shape.data, base)
        if shape.varied:
            documents = self._random.lognormal(0, shape.varied, (shape.data, 16))
            by_data = base * (documents**2).mean(axis=1) / np.exp(2 * shape.varied**2)
        squares = by_data[[place.data for place in self.places]]
        if one.happens == "LengthImbalance":  # the whole step longer by the size: attention by more
            squares = squares * (1 + severity / shape.attention)
        return squares

    def _step(self) -> tuple[list[Work], float]:
        one, shape, random, ranks = self.scenario, self.scenario.shape, self._random, len(self.places)
        severity = self.severity()
        squares = self._lengths(severity)
        tokens = TOKENS * (1 + shape.tokens * random.uniform(-1, 1, shape.data))[[p.data for p in self.places]]
        compute = (0.9 - shape.attention) * tokens / TOKENS + 0.1 + shape.attention * squares / (TOKENS * 1024.0)
        compute *= self._spread * np.exp(random.normal(0, shape.noise, ranks) + random.normal(0, 0.01))
        self._drift = 0.9 * self._drift + random.normal(0, 0.004, len(self._nodes))
        compute *= np.exp(self._drift[self._node_of])
        compute *= 1 + (random.random(ranks) < shape.spikes) * random.pareto(1.5, ranks)
        data = random.exponential(0.004, ranks)
        host = random.exponential(0.006, ranks)
        clock = CLOCK * (1 + random.normal(0, 0.004, ranks))
        if self.step < 3:
            compute *= 5 - self.step
        if self.step % 50 == 49:  # a checkpoint, on some ranks longer than on others
            host += random.exponential(0.1, ranks)
        kind = one.happens
        if kind in {"Clock", "slow node", "ramp", "burst"}:
            compute, clock = compute * (1 + severity), clock / (1 + severity)
        elif kind in {"Memory", "Compute"}:
            compute = compute * (1 + severity)
        elif kind == "Host":
            host += severity * random.lognormal(0, 0.2, ranks)
        elif kind == "Data":
            data += severity * random.lognormal(0, 0.2, ranks)
        elif kind == "sparse data":
            data += severity * (random.random(ranks) < 0.2) * 5
        elif kind == "shared data":
            data += severity * (random.random(ranks) < 1.5 / ranks) * 2
        elif kind == "Pauses":
            host += severity * (random.random(ranks) < 0.3 / ranks) * 3
        elif kind == "PipelineImbalance":
            compute = compute * (1 + severity)
        elif kind == "evaluation" and self.step % 20 >= 17:
            compute = compute * 1.8
        waited, seconds = self._collectives(compute + data + host, severity if kind == "Network" else 0 * severity)
        work = [
            Work(
                rank, float(compute[rank]), float(data[rank]), float(host[rank]),
                {dimension: float(of[rank]) for dimension, of in waited.items()},
                int(tokens[rank]), int(squares[rank]), float(clock[rank]) if shape.clocks else None,
            )
            for rank in range(ranks)
            if random.random() > 0.001
        ]  # fmt: skip
        return work, seconds

    def _collectives(self, own: np.ndarray, links: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
        now, waited = own.copy(), {}
        for dimension, groups in self._groups.items():
            if not groups:
                continue
            waits = np.zeros_like(own)
            for group in groups:
                transfer = TRANSFER[dimension] * np.exp(self._random.normal(0, 0.05)) * (1 + links[group].max())
                if self._random.random() < 0.01:
                    transfer *= 1 + self._random.pareto(1.5)
                last = now[group].max()
                waits[group] = last - now[group] + transfer
                now[group] = last + transfer
            waited[dimension] = waits
        return waited, float(now.max())

    def answer(self, probe: Probe) -> Probed:
        """What is measured now."""
        kind, severity, random = self.scenario.happens, self.severity(), self._random
        noise = self.scenario.probe_noise
        slow = {
            "compute": severity * (kind in {"Clock", "slow node", "ramp", "burst", "Compute"}),
            "memory": severity * (kind == "Memory"),
            "link": severity * (kind == "Network"),
        }[probe.kind]
        if probe.kind == "link":
            return Probed("link", pairs={
                (a, b): float((0.02 if self._node_of[a] == self._node_of[b] else 0.08)
                * (1 + max(slow[a], slow[b])) * np.exp(random.normal(0, 3 * noise)))
                for a, b in probe.pairs
            })  # fmt: skip
        return Probed(probe.kind, ranks={
            rank: float(0.05 * (1 + slow[rank]) * self._probe_spread[rank] * np.exp(random.normal(0, noise)))
            for rank in probe.ranks
        })  # fmt: skip


SHAPES = (
    (8, 1, 1),
    (16, 1, 1),
    (4, 1, 4),
    (4, 4, 1),
    (4, 2, 2),
    (2, 1, 1),
    (1, 4, 1),
    (64, 1, 1),
    (4, 1, 1),
    (1, 1, 1),
    (2, 2, 1),
)


def scenarios(count: int, seed: int = 1) -> Iterator[Scenario]:
    """``count`` of them, each kind in turn."""
    random = np.random.default_rng(seed)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        data, pipeline, tensor = SHAPES[int(random.integers(len(SHAPES)))]
        what = kind.removeprefix("mild ")
        if what == "PipelineImbalance":
            data, pipeline, tensor = ((4, 4, 1), (4, 2, 2), (1, 4, 1), (2, 2, 1))[int(random.integers(4))]
        if what in {"LengthImbalance", "lengths vary", "Pauses", "shared data"}:
            data, pipeline, tensor = ((8, 1, 1), (16, 1, 1), (4, 4, 1), (4, 2, 2))[int(random.integers(4))]
        if kind == "Network":
            data, pipeline, tensor = ((8, 1, 1), (16, 1, 1), (4, 4, 1), (4, 2, 2), (4, 1, 1))[int(random.integers(5))]
        if kind == "slow node":
            data, pipeline, tensor = ((16, 1, 1), (4, 2, 2), (64, 1, 1))[int(random.integers(3))]
        varied = float(random.choice([0.0, 0.5, 1.0])) if what not in {"LengthImbalance", "lengths vary"} else 0.8
        shape = Shape(
            data, pipeline, tensor,
            noise=float(random.choice([0.005, 0.02, 0.04, 0.06])),
            spikes=float(random.choice([0.0, 0.003, 0.01])),
            tokens=float(random.choice([0.0, 0.1])),
            varied=varied,
            attention=float(random.choice([0.1, 0.25, 0.4])),
            clocks=bool(random.random() < 0.8),
        )  # fmt: skip
        places = shape.places()
        onset = 0 if random.random() < 0.3 else int(random.integers(50, 120))
        size = float(random.choice([0.1, 0.12, 0.15, 0.2, 0.3, 0.5]))
        chosen = int(random.integers(len(places)))
        ranks, end = (chosen,), 10**9
        if data == 1 and what != "PipelineImbalance":
            onset = max(onset, 60)  # alone in its stage
        if kind == "Network":
            size = float(random.choice([0.3, 0.5, 1.0, 3.0]))
        elif what in {"PipelineImbalance", "LengthImbalance"}:
            onset, size = 0, float(random.choice([0.15, 0.2, 0.3, 0.5]))
            key = "pipeline" if what == "PipelineImbalance" else "data"
            ranks = tuple(p.rank for p in places if getattr(p, key) == getattr(places[chosen], key))
        elif kind == "slow node":
            ranks = tuple(p.rank for p in places if p.node == places[chosen].node)
        elif what in {"shared data", "Pauses"}:
            ranks, size = tuple(range(len(places))), max(size, 0.15)
        elif kind == "burst":
            onset, size = int(random.integers(20, 150)), float(random.choice([0.2, 0.5, 2.0]))
            end = onset + int(random.integers(1, 18))
        elif kind in {"clean", "lengths vary", "evaluation"}:
            ranks, size = (), 0.0
        noise = float(random.choice([0.005, 0.01, 0.03]))
        threshold = 0.1
        if kind in {"Clock", "Memory", "Compute", "clean"} and random.random() < 0.3:
            threshold, size = 0.05, 0.05 if kind != "clean" else 0.0
        if kind.startswith("mild "):
            size = float(random.uniform(0.2, MILD if what != "Pauses" else MILD / 2)) * threshold
        yield Scenario(kind, 1000 * seed + number, shape, size, onset, end, 260, ranks, threshold, noise)
