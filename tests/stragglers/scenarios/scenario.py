"""A job in virtual time: what a detector is told, step by step, and what it should say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from lockstep_trainer.stragglers.work import Cause, Place, Probe, Probed, Work
from stragglers.recorded import Trace
from stragglers.scenarios import probes
from stragglers.scenarios.faults import Fault, apply, longer
from stragglers.scenarios.layout import Layout
from stragglers.scenarios.noise import Drawn, Job, Noise, devices, draw
from stragglers.scenarios.physics import Floats, Waits, waits


@dataclass(frozen=True)
class Step:
    """One executed step."""

    number: int
    work: list[Work]
    seconds: float


@dataclass(frozen=True)
class Restart:
    """A new generation begins."""

    places: tuple[Place, ...]


@dataclass(frozen=True)
class Expected:
    """What is to be found. Steps are executed ones, counted from 0."""

    ranks: frozenset[int]
    """Empty: all alike."""
    causes: frozenset[Cause]
    begins: int
    """Before this, a finding is a false one."""
    onset: int
    """From here on it is slow beyond the threshold."""
    ends: int | None = None
    """First step without it."""
    any_part: bool = False
    """Naming some of the ranks will do."""


@dataclass(frozen=True)
class Generation:
    """Which device each rank has, for some steps."""

    layout: Layout
    units: tuple[int, ...]
    """By rank."""
    steps: int
    number: int
    """Of its first step."""


@dataclass(frozen=True)
class Rarely:
    """Steps that are longer for everybody; 0: never."""

    evaluate: int = 0
    """Every so many steps,"""
    evaluation: float = 0.0
    """seconds of computing more."""
    save: int = 0
    """Every so many steps,"""
    saving: float = 0.0
    """seconds of the host more."""


@dataclass(frozen=True)
class Scenario:
    """All of it follows from these values."""

    kind: str
    seed: int
    threshold: float
    reason: str
    job: Job
    per_node: int
    generations: tuple[Generation, ...]
    noise: Noise
    faults: tuple[Fault, ...] = ()
    expected: tuple[Expected, ...] = ()
    scored: bool = True
    clocks: float = 1.0
    """Share of the devices whose clock is known."""
    rarely: Rarely = Rarely()
    trace: Trace | None = None
    """A recorded job, whose computing is taken in place of a drawn one."""

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.kind}-{self.seed}"

    @property
    def steps(self) -> int:
        """Executed ones."""
        return sum(generation.steps for generation in self.generations)

    @property
    def places(self) -> tuple[Place, ...]:
        """At the start."""
        return self._places(self.generations[0])

    def run(self) -> Iterator[Step | Restart]:
        """The job."""
        first = 0
        for number, generation in enumerate(self.generations):
            if number:
                yield Restart(self._places(generation))
            yield from self._generation(generation, first, self._random(number))
            first += generation.steps

    def answer(self, probe: Probe, executed: int) -> Probed:
        """What is measured after so many executed steps, before the next one."""
        first = 0
        for generation in self.generations:
            first += generation.steps
            if executed <= first:
                break
        kinds = ("compute", "memory", "link")
        random = self._random(1000 + len(kinds) * executed + kinds.index(probe.kind))
        where = probes.Devices(generation.units, self.per_node, self._devices())
        return probes.answer(probe, where, self.faults, executed, random)

    def _places(self, generation: Generation) -> tuple[Place, ...]:
        return generation.layout.places([f"node-{unit // self.per_node}" for unit in generation.units])

    def _random(self, stream: int) -> Generator:
        return np.random.default_rng([self.seed, *self.kind.encode(), stream])

    def _devices(self) -> Floats:
        units = 1 + max(max(generation.units) for generation in self.generations)
        return devices(self.noise, units, self._random(999))

    def _generation(self, generation: Generation, first: int, random: Generator) -> Iterator[Step]:
        layout = generation.layout
        # the batch of a step stays the same when there are fewer replicas
        more = self.generations[0].layout.data / layout.data
        job = replace(self.job, layout=layout, compute=self.job.compute * more, tokens=round(self.job.tokens * more))
        executed = np.arange(first, first + generation.steps)
        units = np.asarray(generation.units)
        drawn = self._drawn(job, units, executed, random)
        for fault in self.faults:
            apply(fault, drawn, job, _where(fault, layout, units), steps=executed, random=random)
        numbers = np.arange(generation.number, generation.number + generation.steps)
        self._longer_for_all(drawn, numbers, random)
        own = drawn.compute + drawn.host
        found = waits(layout, own, drawn.batch, drawn.link, transfers=job.transfers, spread=drawn.spread)
        known = self._random(998).random(units.max() + 1)[units] < self.clocks
        yield from _told(layout, numbers, drawn, found, known)

    def _drawn(self, job: Job, units: NDArray[np.int64], executed: NDArray[np.int64], random: Generator) -> Drawn:
        nodes = units // self.per_node
        lengths = longer(self.faults, executed, job.layout.data)
        drawn = draw(job, self.noise, lengths, devices=self._devices()[units], nodes=nodes, random=random)
        if self.trace is not None:
            drawn = replace(drawn, compute=self.trace.by_rank(executed, job.layout))
        return drawn

    def _longer_for_all(self, drawn: Drawn, numbers: NDArray[np.int64], random: Generator) -> None:
        rarely, shape = self.rarely, drawn.compute.shape

        def extra(every: int, more: float) -> Floats:
            there = numbers % every == 0 if every else np.zeros(len(numbers), dtype=bool)
            return np.where(there, more, 0.0)[:, None, None, None] * random.normal(1, 0.02, shape)

        drawn.compute += extra(rarely.evaluate, rarely.evaluation)
        drawn.host += extra(rarely.save, rarely.saving)


def _where(fault: Fault, layout: Layout, units: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(data, pipeline, tensor): the ranks that are slow by it."""
    if fault.units:
        return np.isin(units[layout.ranks], fault.units)
    at = np.ones(layout.shape, dtype=bool)
    if fault.stage is not None:
        at[:] = False
        at[:, fault.stage] = True
    return at


def _told(
    layout: Layout, numbers: NDArray[np.int64], drawn: Drawn, found: Waits, known: NDArray[np.bool_]
) -> Iterator[Step]:
    """The arrays as each rank would tell them."""
    at = np.argsort(layout.ranks.reshape(-1))
    count = len(numbers)

    def by_rank(array: Floats) -> list[list[float]]:
        return array.reshape(count, -1)[:, at].tolist()  # type: ignore[no-any-return]

    compute, host, batch, clock = (by_rank(a) for a in (drawn.compute, drawn.host, drawn.batch, drawn.clock))
    waited = {name: by_rank(array) for name, array in found.waited.items()}
    tokens, squares, seconds = drawn.tokens.tolist(), drawn.squares.tolist(), found.seconds.tolist()
    replicas = [d for d, _, _ in layout.coordinates]
    for n, number in enumerate(numbers.tolist()):
        yield Step(
            number,
            [
                Work(
                    rank,
                    compute[n][rank],
                    batch[n][rank],
                    host[n][rank],
                    {name: each[n][rank] for name, each in waited.items()},
                    tokens[n][data],
                    squares[n][data],
                    clock[n][rank] if known[rank] else None,
                )
                for rank, data in enumerate(replicas)
            ],
            seconds[n],
        )
