"""Random jobs and faults, for the kinds of scenarios to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from lockstep_trainer.stragglers.work import Cause
from stragglers.scenarios.faults import ALWAYS, Course, Fault
from stragglers.scenarios.layout import Layout
from stragglers.scenarios.noise import Job, Noise
from stragglers.scenarios.physics import Transfers
from stragglers.scenarios.scenario import Expected, Generation, Scenario
from stragglers.scenarios.strength import fitted

FORMS = ("dp", "dp·tp", "dp·pp", "dp·pp·tp")
REPLICAS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SURE, HARMLESS = 1.2, 0.8  # times the threshold: to be found from here on; to be kept silent about up to here
DEVICES = (Cause.CLOCK, Cause.COMPUTE, Cause.MEMORY)
T = TypeVar("T")


class Unsuited(Exception):
    """This job cannot have what the kind is about; another is drawn."""


class Draft:
    """A scenario in the making."""

    def __init__(self, kind: str, seed: int, attempt: int) -> None:
        self.kind, self.seed = kind, seed
        self.random = np.random.default_rng([seed, *kind.encode(), 7, attempt])
        self.threshold = 0.1
        self.job: Job
        self.per_node = 8

    # ---------------------------------------------------------------------------------------------- chances

    def between(self, low: float, high: float) -> float:
        """Evenly."""
        return float(self.random.uniform(low, high))

    def scale(self, low: float, high: float) -> float:
        """Evenly in the logarithm."""
        return float(np.exp(self.random.uniform(np.log(low), np.log(high))))

    def whole(self, low: int, high: int) -> int:
        """``high`` included."""
        return int(self.random.integers(low, high + 1))

    def one(self, *choices: T) -> T:
        """Any of them."""
        return choices[int(self.random.integers(len(choices)))]

    def maybe(self, chance: float) -> bool:
        """Yes, with that chance."""
        return bool(self.random.random() < chance)

    # ------------------------------------------------------------------------------------------------- jobs

    def draw_job(
        self, *, forms: Sequence[str] = FORMS, least: int = 2, most: int = 512, replicas: int = 2, **values: Any
    ) -> None:
        """A job of ``least`` to ``most`` ranks, most of them small, with that many replicas at least."""
        form = self.one(*forms)
        tensor = self.one(2, 4, 8) if "tp" in form else 1
        pipeline = self.one(2, 4, 8) if "pp" in form else 1
        size = self.scale(least, most * 1.2)
        fitting = [d for d in REPLICAS if d >= replicas and least <= d * tensor * pipeline <= most]
        if not fitting:
            raise Unsuited
        data = min(fitting, key=lambda d: abs(np.log(d * tensor * pipeline / size)))
        layout = Layout(
            data,
            pipeline,
            tensor,
            outermost=self.one("data", "pipeline"),
            micro_batches=pipeline * self.one(1, 2) if pipeline > 1 else self.one(2, 4, 8),
            sharded=pipeline == 1 and self.maybe(0.5),
        )
        self.per_node = 8 if layout.size >= 16 else max(tensor, self.one(1, 2, max(1, layout.size // 2)))
        compute = self.scale(0.3, 4)
        self.job = Job(
            layout=layout,
            compute=compute,
            host=compute * self.scale(0.01, 0.04),
            batch=compute * self.scale(0.001, 0.01),
            transfers=Transfers(
                data=compute * self.scale(0.03, 0.2),
                pipeline=compute * self.scale(0.01, 0.04),
                tensor=compute * self.scale(0.04, 0.15),
            ),
            tokens=self.one(4096, 8192, 16384),
            length=self.one(512, 1024, 2048),
            attention=self.between(0.05, 0.4),
            stages=self._even_stages(pipeline),
            vary_squares=self.one(0.0, 0.0, self.between(0.05, 0.2)),
        )
        self.job = replace(self.job, **values)

    def _even_stages(self, stages: int) -> tuple[float, ...]:
        """As even as layers can be dealt out: a hundredth or two apart."""
        if stages == 1:
            return (1.0,)
        uneven = self.random.normal(1, 0.01, stages).clip(0.98, 1.02)
        return tuple((uneven / uneven.mean()).tolist())

    @property
    def layout(self) -> Layout:
        """Of the job."""
        return self.job.layout

    def rank(self) -> int:
        """Any."""
        return self.whole(0, self.layout.size - 1)

    # ------------------------------------------------------------------------------------------------ faults

    def target(self, most: float = 0.5) -> float:
        """How much slower, well beyond the threshold."""
        return self.scale(SURE * self.threshold, most)

    def onset(self, *, at_start: float = 0.3) -> int:
        """A step, sometimes the first one, where the job's ranks have peers enough to tell by."""
        few = self.layout.data * self.layout.tensor < 3
        return 0 if not few and self.maybe(at_start) else self.whole(60, 140)

    def fit(self, fault: Fault, ranks: tuple[int, ...], *, least: float = 0.0, most: float = 0.0) -> Fault:
        """The fault in that strength."""
        found = fitted(self.job, fault, ranks, least=least, most=most)
        if found is None:
            raise Unsuited
        return found

    def slow(self, cause: Cause, rank: int, target: float, course: Course = ALWAYS, *, chance: float = 1.0) -> Fault:
        """A device, its host, its link or its loader, so that both measures say ``target`` at least."""
        return self.fit(Fault(cause, 1.0, course, units=(rank,), chance=chance), (rank,), least=target)

    # ----------------------------------------------------------------------------------------------- the end

    def noise(self, **values: float) -> Noise:
        """Of ordinary machines."""
        quiet = 0.5 if self.threshold < 0.1 else 1.0
        drawn = Noise(
            rank=self.scale(0.004, 0.02) * quiet,
            devices=self.between(0.001, 0.006) * quiet,
            node=self.one(0.0, self.between(0.001, 0.006)) * quiet,
            drift=self.one(0.0, self.between(0.005, 0.03)),
            outliers=self.one(0.0, self.scale(0.001, 0.01)),
            host=self.between(0.1, 0.4),
            parts=self.between(0.0, 0.03),
        )
        return replace(drawn, **values)

    def after(self) -> int:
        """Steps that a detector is given from the onset on; fewer of many ranks, which are costly to draw."""
        return self.whole(160, 240) if self.layout.size <= 64 else self.whole(110, 150)

    def generation(self, steps: int, **values: Any) -> Generation:
        """Devices by rank, numbers from 1 or as after a restore."""
        number = self.one(1, 1 + 100 * self.whole(1, 90))
        return replace(Generation(self.layout, tuple(range(self.layout.size)), steps, number), **values)

    def scenario(self, reason: str, steps: int = 0, **values: Any) -> Scenario:
        """The draft as it is, of one generation where ``values`` name no others."""
        common: dict[str, Any] = {"noise": self.noise(), "clocks": self.one(1.0, 1.0, 1.0, 0.0)}
        if steps:
            common["generations"] = (self.generation(steps),)
        return Scenario(
            kind=self.kind,
            seed=self.seed,
            threshold=self.threshold,
            reason=reason,
            job=self.job,
            per_node=self.per_node,
            **{**common, **values},
        )


def expect(ranks: Sequence[int], *causes: Cause, begins: int = 0, **values: Any) -> Expected:
    """Slow beyond the threshold as soon as it begins, where ``values`` don't say otherwise."""
    return Expected(frozenset(ranks), frozenset(causes), **{"begins": begins, "onset": begins, **values})


def acceptable(cause: Cause, clocks: float) -> tuple[Cause, ...]:
    """Where no clock is read, a low one looks as a slow device does."""
    return (Cause.CLOCK, Cause.COMPUTE) if cause is Cause.CLOCK and clocks < 1 else (cause,)
