"""What a probe measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from lockstep_trainer.stragglers.work import Cause, Probe, Probed
from stragglers.scenarios.faults import COPIES, PRODUCTS, Fault
from stragglers.scenarios.physics import Floats

# seconds on healthy hardware; within a node a transfer takes a seventh: NVLink beside a network port
PRODUCT, COPY, TRANSFER, WITHIN = 0.02, 0.008, 0.02, 1 / 7
NOISE = 0.01  # of the median of a few repetitions


@dataclass(frozen=True, slots=True)
class Devices:
    """By rank, whose device it is; by device, how much longer it takes for good."""

    units: Sequence[int]
    per_node: int
    longer: Floats


def answer(probe: Probe, devices: Devices, faults: Sequence[Fault], executed: int, random: Generator) -> Probed:
    """Before executed step number ``executed``."""
    units, per_node = devices.units, devices.per_node

    def slower(rank: int, cause: Cause, share: float = 1.0) -> float:
        """Of the whole computing, ``share`` is of the measured sort, and all of the slowness."""
        now = np.array([executed])
        sizes = [f.size * float(f.course.at(now)[0]) for f in faults if f.cause is cause and units[rank] in f.units]
        return float(np.prod([1 + size / share for size in sizes]))

    def product(rank: int) -> float:
        device = slower(rank, Cause.CLOCK) * slower(rank, Cause.COMPUTE, PRODUCTS)
        return PRODUCT * float(devices.longer[units[rank]]) * device

    def transfer(one: int, other: int) -> float:
        within = units[one] // per_node == units[other] // per_node
        link = max(slower(one, Cause.NETWORK), slower(other, Cause.NETWORK))
        return TRANSFER * (WITHIN if within else 1.0) * link

    def measured(seconds: float) -> float:
        return seconds * float(random.lognormal(0, NOISE))

    if probe.kind == "link":
        return Probed("link", pairs={pair: measured(transfer(*pair)) for pair in probe.pairs})
    if probe.kind == "compute":
        return Probed("compute", {rank: measured(product(rank)) for rank in probe.ranks})
    return Probed("memory", {rank: measured(COPY * slower(rank, Cause.MEMORY, COPIES)) for rank in probe.ranks})
