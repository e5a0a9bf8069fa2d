"""What the leader hears of figures that are far above what they lately were. Pure.

Rank 0 tells of an episode's beginning and end by a line ``outlier`` each, as ``lookout`` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lockstep_api.messages import OutlierVerdict

KEPT = 10
"""Episodes that are remembered."""


@dataclass(frozen=True, slots=True)
class Outliers:
    """This job's. Goes with the leader's memory from epoch to epoch."""

    episodes: tuple[OutlierVerdict, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    """Signal, episodes so far."""

    def heard(self, line: Mapping[str, Any], now: float) -> Outliers:
        """With a line in it; as it was where the line is another version's."""
        try:
            signal, since, evidence = str(line["signal"]), int(line["step"]), str(line["evidence"])
            ended = bool(line["ended"])
        except (KeyError, TypeError, ValueError):
            return self
        if ended:
            return replace(
                self, episodes=tuple(_over(one, now) if one.signal == signal else one for one in self.episodes)
            )
        counts = dict(self.counts)
        counts[signal] = counts.get(signal, 0) + 1
        episodes = (*self.episodes, OutlierVerdict(signal, since, evidence, now))[-KEPT:]
        return Outliers(episodes, tuple(counts.items()))

    def started(self, now: float) -> Outliers:
        """A generation starts: what was unusual before it is judged anew."""
        return replace(self, episodes=tuple(_over(one, now) for one in self.episodes))


def _over(one: OutlierVerdict, now: float) -> OutlierVerdict:
    return one if one.ended is not None else replace(one, ended=now)
