"""Steps of the job out of the members' reports, the pace they make, and the parts of a recovery."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from lockstep_api.messages import StepSummary

PACE_WINDOW = 33
"""Steps that the median is taken of; odd, so that it is one of them."""
UNBOUNDED_SECTIONS = frozenset(
    {"starting", "data", "rendezvous", "build", "compile", "restore", "checkpoint", "evaluate", "generate"}
)
"""Sections that may take far longer than a step: only the bound for the first step applies there."""
MEETING = "rendezvous"
"""The section of a worker that meets the others."""
BEFORE_MEETING = ("starting", "data")
"""Sections before it, in order."""
OUTAGE = "outage"
"""The section of a worker that waits for a store: as long as it takes, since a restart would wait for the same."""
PENDING_STEPS = 4
"""Newest steps that wait for a member's report before they count without it."""


class StepFold:
    """Steps of one generation, folded over its nodes. A step is finished once all have reported it; one that a member
    fails to report, since its stream is closed, counts as soon as four newer ones are known: it takes all ranks to make
    them."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._pending: dict[int, dict[int, StepSummary]] = {}
        self._newest = 0
        self.durations: deque[float] = deque(maxlen=PACE_WINDOW)

    def add(self, slot: int, done: Iterable[StepSummary]) -> list[StepSummary]:
        """Steps that are finished by this report, in order. Repeated reports change nothing."""
        for summary in done:
            if summary.step > self._newest:
                self._pending.setdefault(summary.step, {})[slot] = summary
        finished: list[StepSummary] = []
        known = sorted(self._pending)
        for position, step in enumerate(known):
            if len(self._pending[step]) < self._slots and len(known) - position <= PENDING_STEPS:
                break
            finished.append(self._finish(step))
        return finished

    def rest(self) -> list[StepSummary]:
        """Steps that some members did not report, and will not: they count too."""
        return [self._finish(step) for step in sorted(self._pending)]

    def _finish(self, step: int) -> StepSummary:
        summary = fold(tuple(self._pending.pop(step).values()))
        self._newest = step
        self.durations.append(summary.seconds)
        return summary

    @property
    def heard(self) -> int:
        """Newest step that any node has reported; 0 before the first."""
        return max(self._pending, default=self._newest)

    @property
    def median(self) -> float | None:
        """Seconds per step; None before the first."""
        return statistics.median(self.durations) if self.durations else None


def fold(parts: tuple[StepSummary, ...]) -> StepSummary:
    """One step out of several ranks' or nodes' accounts of it: the last to finish sets its end and its MFU,
    sections are means, and memory is the largest. Loss, tokens and gradient norm are global in each of them."""
    if len(parts) == 1:
        return parts[0]
    last = max(parts, key=lambda part: part.at)
    names = {name for part in parts for name in part.sections}
    sections = {name: sum(part.sections.get(name, 0.0) for part in parts) / len(parts) for name in sorted(names)}
    return StepSummary(
        step=last.step,
        at=last.at,
        seconds=max(part.seconds for part in parts),
        loss=last.loss,
        tokens=last.tokens,
        grad_norm=last.grad_norm,
        lr=last.lr,
        sections=sections,
        trained=last.trained,
        mfu=last.mfu,
        memory=max(part.memory for part in parts),
    )


@dataclass(frozen=True, slots=True)
class HangBounds:
    """spec.resilience.hang."""

    factor: float = 5.0
    minimum_seconds: float = 60.0
    first_step_seconds: float = 1800.0
    meeting_seconds: float = 300.0

    def allowed(self, median: float | None, sections: Collection[str]) -> float:
        """Seconds without a step before the generation counts as hung."""
        if OUTAGE in sections:
            return math.inf
        if median is None or any(section in UNBOUNDED_SECTIONS for section in sections):
            return max(self.first_step_seconds, self.minimum_seconds)
        return max(self.minimum_seconds, self.factor * median)

    def allowed_to_meet(self, sections: Collection[str]) -> float:
        """Seconds since the last node came, or went on, before a generation whose workers do not find each other counts
        as hung. There is no bound while somebody is not there yet."""
        if MEETING not in sections or OUTAGE in sections or any(section in sections for section in BEFORE_MEETING):
            return math.inf
        return max(self.meeting_seconds, self.minimum_seconds)


@dataclass(slots=True)
class Recovery:
    """Stopwatch from a fault to the first step that is new. A further fault in between starts no second one."""

    fault_at: float
    noticed_at: float
    highest: int
    """Newest step before the fault."""
    quiesced_at: float | None = None
    restore_at: float | None = None
    restored_at: float | None = None
    first_step_at: float | None = None
    restored_step: int = 0
    source: str = ""
    """Where rank 0 found its state: memory, store."""
    sections: dict[int, str] = field(default_factory=dict)

    def again(self, now: float) -> None:
        """Another fault: what was reached since counts as deciding."""
        self.quiesced_at = self.restore_at = self.restored_at = self.first_step_at = None
        self.noticed_at = min(self.noticed_at, now)
        self.source = ""
        self.sections.clear()

    def section(self, slot: int, name: str, now: float) -> None:
        """Where a node's slowest worker is."""
        if name == "restore" and self.restore_at is None:
            self.restore_at = now
        self.sections[slot] = name
        if self.restore_at is not None and "restore" not in self.sections.values() and self.restored_at is None:
            self.restored_at = now

    def seconds(self, done_at: float) -> dict[str, float]:
        """Parts, in seconds: detect, decide, restart, restore, first_step, recompute. They sum to the whole."""
        marks = [("detect", self.noticed_at), ("decide", self.quiesced_at), ("restart", self.restore_at)]
        marks += [("restore", self.restored_at), ("first_step", self.first_step_at), ("recompute", done_at)]
        parts: dict[str, float] = {}
        last = self.fault_at
        for name, mark in marks:
            reached = last if mark is None else max(last, mark)
            parts[name] = round(reached - last, 3)
            last = reached
        return parts
