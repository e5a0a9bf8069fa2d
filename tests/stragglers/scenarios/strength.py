"""How slow is it: what a fault does to a job without noise, whose documents are all alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lockstep_trainer.stragglers.work import Cause
from stragglers.scenarios.faults import ALWAYS, Fault, apply, longer
from stragglers.scenarios.noise import QUIET, Drawn, Job, draw
from stragglers.scenarios.physics import waits

NOT_OWN = frozenset({Cause.NETWORK, Cause.PAUSES})
LARGEST = 30.0


@dataclass(frozen=True)
class Strength:
    """Shares: 0.3 is 30 % longer."""

    own: float
    """The slow ranks' own work; the step's, where the slow part isn't own work."""
    step: float
    """The job's step."""

    @property
    def least(self) -> float:
        """By the measure that sees less of it."""
        return min(self.own, self.step)

    @property
    def most(self) -> float:
        """By the measure that sees more of it."""
        return max(self.own, self.step)


def strength(job: Job, fault: Fault, ranks: tuple[int, ...]) -> Strength:
    """Of a fault at its worst; ``ranks`` are those that it makes slow, none for all."""
    steps = np.arange(300 if fault.chance < 1 else 1)
    fault = replace(fault, course=ALWAYS)
    job = replace(job, vary_squares=0.0, vary_tokens=0.0)
    layout = job.layout
    at = np.isin(layout.ranks, ranks) if ranks else np.ones(layout.shape, dtype=bool)
    even, nodes = np.ones(layout.size), np.zeros(layout.size, dtype=np.int64)

    def drawn(faults: list[Fault]) -> Drawn:
        random = np.random.default_rng(5)
        found = draw(job, QUIET, longer(faults, steps, layout.data), devices=even, nodes=nodes, random=random)
        for each in faults:
            apply(each, found, job, at, steps=steps, random=random)
        return found

    slow, healthy = drawn([fault]), drawn([])
    if fault.cause is Cause.PIPELINE:  # healthy is the same work, spread evenly over the stages
        healthy.compute = np.broadcast_to(slow.compute.mean(axis=2, keepdims=True), slow.compute.shape)
        others = slow.own[:, ~at].mean()
    else:
        others = healthy.own[:, at].mean()
    step = seconds(job, slow) / seconds(job, healthy) - 1
    return Strength(step if fault.cause in NOT_OWN else float(slow.own[:, at].mean() / others - 1), step)


def seconds(job: Job, drawn: Drawn) -> float:
    """Mean time of a step."""
    own = drawn.compute + drawn.host
    found = waits(job.layout, own, drawn.batch, drawn.link, transfers=job.transfers, spread=drawn.spread)
    return float(found.seconds.mean())


def fitted(job: Job, fault: Fault, ranks: tuple[int, ...], *, least: float = 0.0, most: float = 0.0) -> Fault | None:
    """The fault in the size that is just ``least`` by the measure that sees less of it, or ``most`` by the one that
    sees more; None where no size is: the job has slack there."""
    low, high = 1e-3, LARGEST

    def enough(size: float) -> bool:
        found = strength(job, replace(fault, size=size), ranks)
        return found.least >= least if least else found.most >= most

    if not enough(high):
        return None
    for _ in range(13):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if enough(middle) else (middle, high)
    return replace(fault, size=high if least else low)
