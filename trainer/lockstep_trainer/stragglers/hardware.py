"""What a probe of devices says of its suspects: matrix product and memory copy against those of healthy ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lockstep_trainer.stragglers import settings
from lockstep_trainer.stragglers.shifts import Shift
from lockstep_trainer.stragglers.work import Cause, Probe, Probed, ProbeKind

_NOISE = 0.02
"""Least noise of a round of a probe where fewer than three references tell it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How much slower a suspect is than the references: logarithms of ratios, 0 where it is as fast as they."""

    product: float
    copy: float
    error: float
    """How far references are from each other, rounds taken together: noise, and devices that differ a little. Of fewer
    than three, how far the rounds are from each other where that is more."""


@dataclass(slots=True)
class Inquiry:
    """Devices under suspicion, measured at the same time as a few without."""

    asked: int
    """Step, as counted by the search, at which it was asked last."""
    suspects: dict[int, float]
    """Rank → how slow its work is, as a logarithm; 0 where only its host is late."""
    references: tuple[int, ...]
    compute: Mapping[int, Shift] = field(default_factory=dict)
    host: Mapping[int, Shift] = field(default_factory=dict)
    stages: Mapping[int, Shift] = field(default_factory=dict)
    """Suspicions: by index of the rank, of the stage."""
    answers: dict[ProbeKind, list[Mapping[int, float]]] = field(default_factory=lambda: {"compute": [], "memory": []})

    def ask(self) -> list[Probe]:
        """The next round."""
        ranks = tuple(sorted({*self.suspects, *self.references}))
        return [Probe("compute", ranks), Probe("memory", ranks)]

    def take(self, answer: Probed) -> bool:
        """Takes an answer; True when the round is complete."""
        self.answers[answer.kind].append({rank: seconds for rank, seconds in answer.ranks.items() if seconds > 0})
        return len(self.answers["compute"]) == len(self.answers["memory"])

    def reading(self, rank: int, healthy: Mapping[ProbeKind, float]) -> Reading | None:
        """What the rounds so far say of a suspect; None where it or what it is compared with was not measured.

        Args:
            rank: The suspect.
            healthy: Logarithm of its own earlier seconds, for a rank alone in its job.
        """
        found: dict[ProbeKind, float] = {}
        errors: list[float] = []
        for kind in ("compute", "memory"):
            ratios: list[float] = []
            others: dict[int, list[float]] = {one: [] for one in self.references}
            for round_ in self.answers[kind]:
                logs = {one: math.log(round_[one]) for one in self.references if one in round_}
                if not logs and kind not in healthy:
                    continue
                middle = float(np.median(list(logs.values()))) if logs else healthy[kind]
                for one, value in logs.items():
                    others[one].append(value - middle)
                if rank in round_:
                    ratios.append(math.log(round_[rank]) - middle)
            if not ratios:
                return None
            found[kind] = float(np.median(ratios))
            levels = [float(np.median(values)) for values in others.values() if values]
            errors.append(float(np.std(levels, ddof=1)) if len(levels) >= 3 else _of_rounds(ratios))
        return Reading(found["compute"], found["memory"], max(errors))

    def undecided(self, readings: Mapping[int, Reading | None], threshold: float) -> bool:
        """Another round is needed: a reading is too near to where it would agree, or nothing tells its noise yet."""
        rounds = len(self.answers["compute"])
        if rounds >= settings.PROBE_ROUNDS:
            return False
        if rounds < settings.PROBE_FEW_ROUNDS and len(self.references) < 3:
            return True
        return any(
            min(abs(one.product - cut), abs(one.copy - cut)) < 2 * one.error
            for rank, one in readings.items()
            if one is not None and (cut := agrees_from(self.suspects[rank], threshold, one.error))
        )


def _of_rounds(ratios: Sequence[float]) -> float:
    """Standard error of the median of a rank's rounds."""
    spread = float(np.std(ratios, ddof=1)) if len(ratios) > 1 else 0.0
    return max(_NOISE, math.sqrt(math.pi / 2) * spread) / math.sqrt(len(ratios))


def agrees_from(excess: float, threshold: float, error: float = 0.0) -> float:
    """How slow a probe must be to agree with a suspicion, as a logarithm."""
    return max(settings.PROBE_AGREES * threshold, settings.PROBE_EXPLAINS * excess, settings.PROBE_CERTAIN * error)


@dataclass(frozen=True, slots=True)
class Clock:
    """How much lower a suspect's clock is than the references', as a logarithm; 0 where it is not known."""

    now: float = 0.0
    lately: float = 0.0


def cause(reading: Reading, clock: Clock, excess: float, threshold: float) -> Cause | None:
    """Why a device is slow; None where it is not.

    Args:
        reading: What the probes say.
        clock: What its clock says.
        excess: How slow its work is, as a logarithm.
        threshold: What counts, as a logarithm.
    """
    cut = agrees_from(excess, threshold, reading.error)
    if reading.product >= cut and reading.product >= reading.copy / 2:
        slow = min(reading.product, excess) if excess else reading.product
        low = max(clock.now, clock.lately) >= settings.CLOCK_EXPLAINS * slow
        return Cause.CLOCK if low else Cause.COMPUTE
    if reading.copy >= cut:
        return Cause.MEMORY
    low = min(clock.now, clock.lately) >= max(cut, settings.CLOCK_EXPLAINS * excess)
    return Cause.CLOCK if excess and low else None  # a short probe need not heat the device up
