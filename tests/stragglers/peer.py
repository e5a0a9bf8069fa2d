"""NVRx's rule as something that can be scored: each rank that a report newly flags is a finding."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep_trainer.stragglers.work import Cause, Ended, Finding, Place, Probed, Work
from stragglers.nvrx import EVERY, Report
from stragglers.score import Said


class Nvrx:
    """It knows no causes and no threshold but its own: all is called slow computing."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._begin(places)

    def _begin(self, places: Sequence[Place]) -> None:
        self._report, self._steps = Report(places), 0
        self._flagged: dict[int, Finding] = {}

    def step(self, number: int, work: Sequence[Work], seconds: float) -> Said:
        """A step; what the report that may follow it says anew."""
        flagged = self._report.step(work)
        self._steps += 1
        if self._steps % EVERY:
            return ()
        ended = [Ended(self._flagged.pop(rank), number) for rank in sorted(self._flagged.keys() - flagged)]
        new = {rank: Finding(Cause.COMPUTE, (rank,), number, 0.0, 0.0, "") for rank in flagged - self._flagged.keys()}
        self._flagged |= new
        return [*ended, *(new[rank] for rank in sorted(new))]

    def probed(self, answer: Probed) -> Said:
        """It asks for no probes."""
        raise AssertionError(answer)

    def restart(self, places: Sequence[Place]) -> Sequence[Ended]:
        """A new generation is measured anew."""
        over = [Ended(finding, 0) for finding in self._flagged.values()]
        self._begin(places)
        return over
