"""What makes ranks slow, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from lockstep_trainer.stragglers.work import Cause
from stragglers.scenarios.noise import Drawn, Job
from stragglers.scenarios.physics import Floats

PRODUCTS = 0.75  # share of the computing that is matrix products, which a slow device does slowly
COPIES = 0.5  # share of it that waits for the device's memory


@dataclass(frozen=True)
class Course:
    """How it goes over the executed steps, counted from 0."""

    begins: int = 0
    full: int | None = None
    """When it is as bad as it gets, after a ramp; None: at once."""
    ends: int | None = None
    """First step without it; None: never."""
    on: int = 0
    """Comes and goes: so many steps with it,"""
    off: int = 0
    """then so many without; 0: always there."""

    def at(self, steps: NDArray[np.int64]) -> Floats:
        """How bad it is, 0 to 1."""
        since = steps - self.begins
        ramp = 1 if self.full is None else self.full - self.begins
        level = np.clip((since + 1) / ramp, 0, 1)
        level[since < 0] = 0
        if self.ends is not None:
            level[steps >= self.ends] = 0
        if self.off:
            level[since % (self.on + self.off) >= self.on] = 0
        return level


ALWAYS = Course()


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    cause: Cause
    size: float
    """How much longer, 0.3 for 30 %: the computing (clock, device, memory, stage), Σ length² (lengths), transfers
    (link). What host, batch and pauses add in the mean of the steps, in shares of the job's computing."""
    course: Course = ALWAYS
    units: tuple[int, ...] = ()
    """Devices, where hardware or a loader is at fault; empty: all ranks."""
    data: int | None = None
    """The data rank with the longer documents."""
    stage: int | None = None
    """The heavier pipeline stage."""
    chance: float = 1.0
    """Of a step to have it (host, batch of a rank or of all, and each rank's pauses)."""


def longer(faults: Sequence[Fault], steps: NDArray[np.int64], ranks: int) -> Floats:
    """How many times as large Σ length² is, (steps, data)."""
    found = np.ones((len(steps), ranks))
    for fault in faults:
        if fault.cause is Cause.LENGTHS:
            assert fault.data is not None
            found[:, fault.data] *= 1 + fault.size * fault.course.at(steps)
    return found


def apply(
    fault: Fault, drawn: Drawn, job: Job, at: NDArray[np.bool_], *, steps: NDArray[np.int64], random: Generator
) -> None:
    """Make the ranks of ``at``, (data, pipeline, tensor), slow in the arrays of a healthy job."""
    level = np.where(at, fault.course.at(steps)[:, None, None, None], 0.0)
    slower = 1 + fault.size * level
    match fault.cause:
        case Cause.CLOCK:
            drawn.compute *= slower
            drawn.clock /= slower
        case Cause.COMPUTE | Cause.MEMORY | Cause.PIPELINE:
            drawn.compute *= slower
        case Cause.NETWORK:
            drawn.link *= slower
        case Cause.HOST:
            drawn.host += fault.size * job.compute * level * _uneven(random, fault.chance, level.shape)
        case Cause.DATA:
            # the store keeps everybody waiting in the same steps, a rank's own loader that rank alone
            shape = level.shape if fault.units else (len(level), 1, 1, 1)
            drawn.batch += fault.size * job.compute * level * _uneven(random, fault.chance, shape)
        case Cause.PAUSES:
            hit = random.random(level.shape) < fault.chance
            drawn.host += fault.size * job.compute * level * hit * random.uniform(0.7, 1.3, level.shape)
        case Cause.LENGTHS:
            pass  # its documents were drawn with it


def _uneven(random: Generator, chance: float, shape: tuple[int, ...]) -> Floats:
    """Of mean 1: in some of the steps, and never alike."""
    return np.where(random.random(shape) < chance, random.gamma(9, 1 / 9, shape) / chance, 0.0)
