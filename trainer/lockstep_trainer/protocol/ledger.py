"""Where the members' GPU time went: a fold of phases and steps into classes that sum to the time that has passed.

The leader's part of the ledger: members only, cumulative within the epoch. The operator adds queued, idle and replaced
pods and checks the sum against the time that pods were held.

Productive time comes from step records alone. A step that was done before on this lineage is recomputing, whole. Time
between two steps that no record covers is unattributed; before the first step of a generation it is starting or
recovering; from the last step before a fault to the moment it was noticed it is detecting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lockstep_api.messages import StepSummary

Phase = Literal["starting", "running", "recovering"]

STARTING, COMPILING, PRODUCTIVE, DATA_WAIT, CHECKPOINT_STALL, EVALUATING = (
    "starting",
    "compiling",
    "productive",
    "dataWait",
    "checkpointStall",
    "evaluating",
)
DETECTING, RECOVERING, RECOMPUTING, UNATTRIBUTED = (
    "detecting",
    "recovering",
    "recomputing",
    "unattributed",
)
CLASSES = (
    STARTING, COMPILING, PRODUCTIVE, DATA_WAIT, CHECKPOINT_STALL, EVALUATING, DETECTING, RECOVERING, RECOMPUTING,
    UNATTRIBUTED,
)  # fmt: skip
SECTION_CLASSES = {
    "compile": COMPILING,
    "load": DATA_WAIT,
    "checkpoint": CHECKPOINT_STALL,
    "stage": CHECKPOINT_STALL,
    "evaluate": EVALUATING,
    "generate": EVALUATING,
}
"""Sections of a step that are no training. All others are."""


@dataclass(slots=True)
class Ledger:
    """Mutable: seconds per class up to ``until``, for ``gpus`` GPUs."""

    gpus: int
    until: float  # Unix seconds: everything before it is classified
    highest: int = 0  # newest step ever done on the lineage
    phase: Phase = "starting"
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self, summary: StepSummary) -> None:
        """A step was finished, by all members."""
        begun = summary.at - max(summary.seconds, 0.0)
        if self.phase != "running":
            # Also where clocks differ a little: nothing is counted twice, so what came before ends at `until` at least.
            self._advance(begun, RECOVERING if self.phase == "recovering" else STARTING)
            self.phase = "running"
        passed = summary.at - self.until
        if passed <= 0:
            self.highest = max(self.highest, summary.step)
            return
        if summary.step <= self.highest:
            self._advance(summary.at, RECOMPUTING)
            return
        self.highest = summary.step
        idle = dict.fromkeys(SECTION_CLASSES.values(), 0.0)
        for section, spent in summary.sections.items():
            if section in SECTION_CLASSES:
                idle[SECTION_CLASSES[section]] += spent
        covered = min(passed, max(summary.seconds, sum(summary.sections.values())))
        scale = min(1.0, covered / total) if (total := sum(idle.values())) > 0 else 1.0
        for name, spent in idle.items():
            self._add(name, spent * scale)
        self._add(PRODUCTIVE, covered - sum(idle.values()) * scale)
        self._add(UNATTRIBUTED, passed - covered)
        self.until = summary.at

    def fault(self, noticed: float) -> None:
        """A generation was given up: what passed since its last step, or its start, was detecting."""
        if self.phase == "running":
            self._advance(noticed, DETECTING)
        else:
            self._advance(noticed, RECOVERING if self.phase == "recovering" else STARTING)
        self.phase = "recovering"

    def pass_time(self, now: float, section: str) -> None:
        """Time outside steps, while the workers say that they are in ``section``: the end of a run, or a user's script,
        that reports no steps."""
        if self.phase == "running":
            self._advance(now, SECTION_CLASSES.get(section, UNATTRIBUTED))
        else:
            self._advance(now, RECOVERING if self.phase == "recovering" else STARTING)

    def totals(self) -> dict[str, float]:
        """Class → GPU-seconds, all classes, cumulative."""
        return {name: round(self.seconds.get(name, 0.0) * self.gpus, 3) for name in CLASSES}

    def goodput(self) -> float | None:
        """Productive share of all that was counted; None at the very start."""
        total = sum(self.seconds.values())
        return self.seconds.get(PRODUCTIVE, 0.0) / total if total else None

    def _advance(self, to: float, name: str) -> None:
        if to > self.until:
            self._add(name, to - self.until)
            self.until = to

    def _add(self, name: str, seconds: float) -> None:
        if seconds > 0:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
