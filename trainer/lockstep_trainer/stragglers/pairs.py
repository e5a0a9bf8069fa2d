"""Whose link is slow: pairs of ranks, each suspect with a few partners, all pairs of a round disjoint.

Three rounds whatever the number of ranks, in place of all pairs. As in DLRover's pair check and Greyhound's O(1)
validation: a rank is slow when it is slow with each of its partners, and these are not the same ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from lockstep_trainer.stragglers import settings
from lockstep_trainer.stragglers.shifts import Shift
from lockstep_trainer.stragglers.work import Probe

Pair: TypeAlias = tuple[int, int]
_FEW = 8
"""Ranks up to which all are paired in each round."""
_NOISE = 0.03
"""Standard deviation of a pair's logarithm that is always granted: few pairs do not tell it well."""
_QUARTILE = 0.6745
"""Standard deviations from the quartile of normal noise to its middle."""
_COMPARABLE = 3
"""Pairs of a kind from which one can be told to be slow."""


@dataclass(slots=True)
class LinkInquiry:
    """Links under suspicion."""

    asked: int
    """Step, as counted by the search, at which it was asked last."""
    groups: Mapping[int, Shift]
    """Suspected groups; none for the look at all links that a job begins with."""
    ranks: tuple[int, ...]
    """Ranks of these groups, and others where these are too few to be compared."""
    nodes: Mapping[int, str]
    rounds: list[Mapping[Pair, float]] = field(default_factory=list)

    def ask(self, threshold: float) -> Probe:
        """Pairs of the next round."""
        met = {pair for round_ in self.rounds for pair in round_}
        if not self.rounds or len(self.ranks) <= _FEW:
            ordered = spread(self.ranks, self.nodes)
            return Probe("link", pairs=tuple(matching(ordered, len(self.rounds))))
        ratios = self._ratios()
        slow = sorted({rank for pair, ratio in ratios.items() if ratio >= threshold / 2 for rank in pair})
        fine = [rank for rank in spread(self.ranks, self.nodes) if rank not in slow]
        pairs: list[Pair] = []
        for suspect in slow:
            partner = next(
                (
                    one
                    for apart in (True, False)
                    for one in fine
                    if ordered_pair(suspect, one) not in met and (self.nodes[one] != self.nodes[suspect]) == apart
                ),
                None,
            )
            if partner is not None:
                fine.remove(partner)
                pairs.append(ordered_pair(suspect, partner))
        # a few pairs of healthy ranks beside them, so that one knows how long it takes now
        pairs += [ordered_pair(*two) for two in zip(fine[0:8:2], fine[1:8:2], strict=False)]
        return Probe("link", pairs=tuple(pairs))

    def done(self, threshold: float) -> bool:
        """All rounds were answered, or the first one of a look at all links shows none that is slow."""
        ratios = self._ratios()
        clear = not self.groups and bool(ratios) and max(ratios.values()) < threshold
        return clear or len(self.rounds) >= settings.LINK_ROUNDS

    def slow(self, threshold: float) -> dict[int, float]:
        """Ranks whose links are slow on average, and with each of two partners or more → how slow, as a logarithm.

        The slowest first: what it explains is not held against its partners.
        """
        ratios, noise = self._compared()
        named: dict[int, float] = {}
        while True:
            by_rank: dict[int, list[float]] = defaultdict(list)
            for pair, ratio in ratios.items():
                if not set(pair) & set(named):
                    for rank in pair:
                        by_rank[rank].append(ratio)
            slow = {
                rank: float(np.mean(found))
                for rank, found in by_rank.items()
                if len(found) >= 2
                and np.mean(found) >= max(threshold, settings.LINK_CERTAIN * noise / math.sqrt(len(found)))
                and min(found) >= threshold / 2
            }
            if not slow:
                return named
            worst = max(slow, key=lambda rank: slow[rank])
            named[worst] = slow[worst]

    def _ratios(self) -> dict[Pair, float]:
        return self._compared()[0]

    def _compared(self) -> tuple[dict[Pair, float], float]:
        """Pair → logarithm of its seconds over those of healthy pairs of its kind, within a node or between two; and
        the standard deviation of healthy ones."""
        kinds: dict[bool, list[tuple[Pair, float]]] = defaultdict(list)
        for round_ in self.rounds:
            for pair, seconds in round_.items():
                kinds[self.nodes[pair[0]] == self.nodes[pair[1]]].append((pair, math.log(max(seconds, 1e-9))))
        found: dict[Pair, float] = {}
        noises = [_NOISE]
        for alike in kinds.values():
            if len(alike) < _COMPARABLE:
                continue
            # suspects are measured more often than others, half of all pairs may be slow: the lower quartile is not,
            # and tells with the median, or with the least where the median is slow, what healthy ones differ by
            ordered = sorted(seconds for _, seconds in alike)
            quartile = ordered[(len(ordered) - 1) // 4]
            upper, lower = float(np.median(ordered)) - quartile, quartile - ordered[0]
            noise = min(upper / _QUARTILE, lower) if lower else 0.0
            noises.append(noise)
            found.update({pair: seconds - quartile - _QUARTILE * noise for pair, seconds in alike})
        return found, max(noises)


def spread(ranks: Iterable[int], nodes: Mapping[int, str]) -> list[int]:
    """Ranks in an order in which those of one node are half of the ranks apart: partners are on other nodes."""
    by_node: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(ranks):
        by_node[nodes[rank]].append(rank)
    return [rank for node in sorted(by_node) for rank in by_node[node]]


def matching(ordered: Sequence[int], round_: int) -> list[Pair]:
    """Disjoint pairs, other ones in each of the first rounds: the first half with the second, turned by the round.

    Three ranks or fewer, where both halves have one rank: by the circle method.
    """
    count = len(ordered)
    if count <= 4:
        seats: list[int | None] = [*ordered] if count % 2 == 0 else [*ordered, None]
        turn = round_ % max(len(seats) - 1, 1)
        seats = [seats[0], *seats[1 + turn :], *seats[1 : 1 + turn]] if len(seats) > 2 else seats
        halves = zip(seats[: len(seats) // 2], seats[: len(seats) // 2 - 1 : -1], strict=True)
        return [ordered_pair(a, b) for a, b in halves if a is not None and b is not None]
    half = count // 2
    first, second = ordered[:half], ordered[half:]
    return [ordered_pair(first[at], second[(at + round_) % len(second)]) for at in range(half)]


def ordered_pair(one: int, other: int) -> Pair:
    """The pair as it is asked and answered: lower rank first."""
    return (one, other) if one < other else (other, one)
