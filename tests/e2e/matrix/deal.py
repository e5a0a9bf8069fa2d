"""Deals faults and phases to the topologies, from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from e2e.matrix.faults import FAULTS
from e2e.matrix.moments import PHASES


@dataclass(frozen=True, slots=True)
class Case:
    """One fault in one phase of one topology's job."""

    topology: str
    fault: str
    phase: str

    def __str__(self) -> str:
        return f"{self.topology}-{self.fault}-{self.phase}"


def pairs(seed: int) -> list[tuple[str, str]]:
    """Each fault in each phase, once."""
    every = [(fault, phase) for fault in FAULTS for phase in PHASES]
    return random.Random(seed).sample(every, len(every))


def deal(seed: int, topologies: Sequence[str], *, everywhere: bool = False) -> list[Case]:
    """The cases by topology. Together the topologies have each pair once; with ``everywhere`` each of them has."""
    cases = []
    for place, topology in enumerate(topologies):
        drawn = pairs(seed + place if everywhere else seed)
        mine = drawn if everywhere else drawn[place :: len(topologies)]
        cases += [Case(topology, fault, phase) for fault, phase in mine]
    return cases


def short(seed: int, topology: str) -> list[Case]:
    """The faults that no other test of the cluster does, once each, in a phase of the seed's."""
    dice = random.Random(seed)
    names = [fault.name for fault in FAULTS.values() if fault.everywhere]
    calm = [name for name, phase in PHASES.items() if not phase.recovers]  # a recovery first costs seconds more
    return [Case(topology, name, dice.choice(calm)) for name in dice.sample(names, len(names))]
