"""What was found and stands, and what rests as no probe confirmed it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lockstep_trainer.stragglers import settings
from lockstep_trainer.stragglers.work import Ended, Finding

Part = str
"""Which history shows it: ``compute``, ``host``, ``data``, ``lengths``, ``stages``, ``links`` …"""


@dataclass(frozen=True, slots=True)
class Standing:
    """A finding, and by what it is seen to be over."""

    finding: Finding
    part: Part
    units: frozenset[int]
    """Columns of the part's history."""
    window: int
    """Steps over which it was seen."""
    found: int
    """Step, as counted here, at which it was found."""
    alone: Callable[[frozenset[int]], Finding] | None = None
    """The finding as it is with some of the units only; None where it is all of them or nothing."""


class Register:
    """Findings that stand."""

    def __init__(self) -> None:
        self.standing: list[Standing] = []
        self._rests: dict[tuple[Part, int], tuple[int, int]] = {}

    def add(self, standing: Standing) -> Finding:
        """A new finding."""
        self.standing.append(standing)
        return standing.finding

    def ended(self, step: int, now: int, over: Callable[[Standing], bool]) -> list[Ended]:
        """Those that are over by ``over``, asked when a whole window has passed since they were found."""
        gone = [one for one in self.standing if now - one.found >= one.window and over(one)]
        self.standing = [one for one in self.standing if one not in gone]
        return [Ended(one.finding, step) for one in gone]

    def narrowed(self, step: int, now: int, over: Callable[[Standing, int], bool]) -> list[Ended | Finding]:
        """Those that no longer hold for some of their units, ``over``, said anew for the others.

        A rank beside the slow one is named with it for less than the slow one itself is. It may have been chance.
        """
        said: list[Ended | Finding] = []
        for at, one in enumerate(self.standing):
            if one.alone is None or now - one.found < one.window:
                continue
            left = frozenset(unit for unit in one.units if not over(one, unit))
            if left and left != one.units:
                self.standing[at] = now_said = replace(one, finding=one.alone(left), units=left)
                said += [Ended(one.finding, step), now_said.finding]
        return said

    def drop(self, step: int, gone: Callable[[Finding], bool]) -> list[Ended]:
        """Those that cannot be true any more."""
        lost = [one for one in self.standing if gone(one.finding)]
        self.standing = [one for one in self.standing if one not in lost]
        return [Ended(one.finding, step) for one in lost]

    def rest(self, part: Part, units: Iterable[int], now: int) -> None:
        """These were not confirmed: leave them alone for a while, longer each time."""
        for unit in units:
            _, times = self._rests.get((part, unit), (0, 0))
            steps = settings.BACKOFF * 2 ** min(times, settings.BACKOFF_DOUBLINGS)
            self._rests[part, unit] = (now + steps, times + 1)

    def blocked(self, part: Part, now: int) -> frozenset[int]:
        """Units of a part that are not to be suspected now: found already, or at rest."""
        resting = {unit for (which, unit), (until, _) in self._rests.items() if which == part and now < until}
        return frozenset(resting | self.units(part))

    def units(self, part: Part) -> frozenset[int]:
        """Units of a part with a finding that stands."""
        return frozenset(unit for one in self.standing if one.part == part for unit in one.units)

    def forget(self) -> None:
        """Rests are over: a new generation, other nodes maybe."""
        self._rests.clear()
