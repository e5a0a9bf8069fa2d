"""Who is wrong, from computations of the same micro-batches by several units. Pure.

Each micro-batch is computed by its own unit (the step itself) and by the next one along the ring (the replay). Where
these two differ, it is computed again (the arbiter), so that each unit's work can be judged:

three units or more
    The unit behind the next one computes it too. Two that agree outvote the third. A unit takes part in three
    micro-batches: a fault that is always there loses all three votes, one that comes and goes loses some.
two units
    Both compute both micro-batches again. Who disagrees with itself is wrong. A fault that is always there repeats
    itself, and leaves two units of which one is wrong.
one unit
    It computes its micro-batch three times. Only a fault that comes and goes shows.

This holds the rule of both edges («a fault that is always there breaks the edge to either neighbour») and asks for
less: nothing is decided on one comparison, and two units that are wrong at once are both found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from lockstep_trainer.replay.points import Order, Point
from lockstep_trainer.replay.units import Units

FIRST = (0, 1)
"""How far along the ring the units are that compute a micro-batch on a replayed step: its own, and the next."""


def arbiters(units: int) -> tuple[int, ...]:
    """Which units compute it again after a disagreement, in order, counted from its own."""
    return {1: (0,), 2: (0, 1)}.get(units, (2,))


@dataclass(frozen=True, slots=True)
class Difference:
    """The first point in which two computations differ on one rank."""

    point: Point
    order: Order


Pair = tuple[int, int]
"""Two of a micro-batch's computations, by their places in FIRST + arbiters."""


def all_pairs(units: int) -> Iterator[Pair]:
    """Of a micro-batch that arbiters have computed too."""
    return combinations(range(len(_offsets(units))), 2)


Differences = Mapping[Pair, Difference]
"""What one rank found about the micro-batch of its own unit; pairs that agree are left out."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a disagreement comes to."""

    kind: Literal["permanent", "intermittent", "undecided"]
    """permanent: the unit was wrong each time that it was looked at. undecided: nobody can say who is wrong."""
    unit: int | None
    ranks: tuple[int, ...]
    """The rank that is wrong; more than one where all that is known is that it is among them."""
    point: Point
    """Where it showed first."""
    confidence: float
    """Share of the unit's computations in this round that were wrong; 0 where undecided."""
    evidence: str
    """A sentence."""

    @property
    def named(self) -> bool:
        """A single rank is named."""
        return len(self.ranks) == 1


@dataclass(frozen=True, slots=True)
class _Accusation:
    """One computation that was wrong."""

    micro_batch: int  # of this unit
    unit: int  # that computed it
    point: Point
    ranks: tuple[int, ...]  # of that unit


def undecided(verdicts: Sequence[Verdict]) -> bool:
    """Nobody can say who is wrong."""
    return all(verdict.unit is None for verdict in verdicts)


def judge(units: Units, found: Sequence[Differences], *, of: str = "micro-batches") -> tuple[Verdict, ...]:
    """Verdicts from what each rank found, by rank; none where all computations agree. ``of``: what was computed.

    Each unit that was outvoted or disagrees with itself gets one, in order. Where there is none, but something differs,
    one verdict says so.
    """
    accused: dict[int, list[_Accusation]] = defaultdict(list)
    doubts: list[tuple[Order, tuple[_Accusation, ...]]] = []
    for unit in range(units.number):
        pairs = _of_unit(units, unit, found)
        if not pairs:
            continue
        wrong = _outvoted(units, set(pairs))
        for computation, pair in wrong:
            accusation = _accuse(units, unit, computation, pairs[pair])
            accused[accusation.unit].append(accusation)
        if not wrong:
            pair = min(pairs, key=lambda pair: _first(pairs[pair]))
            either = tuple(_accuse(units, unit, computation, pairs[pair]) for computation in pair)
            doubts.append((_first(pairs[pair]), either))
    if accused:
        return tuple(_verdict(units, unit, accused[unit], of) for unit in sorted(accused))
    if doubts:
        return (_undecided([either for _, either in sorted(doubts, key=lambda doubt: doubt[0])], units, of),)
    return ()


def _first(seen: Sequence[tuple[int, Difference]]) -> Order:
    return min(difference.order for _, difference in seen)


def _of_unit(units: Units, unit: int, found: Sequence[Differences]) -> dict[Pair, list[tuple[int, Difference]]]:
    """Pair → which of the unit's ranks saw it differ, and where first."""
    pairs: dict[Pair, list[tuple[int, Difference]]] = defaultdict(list)
    for rank in units.ranks(unit):
        for pair, difference in found[rank].items():
            pairs[pair].append((rank, difference))
    return dict(pairs)


def _offsets(units: int) -> tuple[int, ...]:
    return FIRST + arbiters(units) if units > 1 else (0, 0, *arbiters(1))


def _outvoted(units: Units, differ: set[Pair]) -> list[tuple[int, Pair]]:
    """The computations that are wrong, and the pair that shows where."""
    offsets = _offsets(units.number)
    wrong: list[tuple[int, Pair]] = []
    if units.outvote:
        for third in range(3):
            mine = {tuple(sorted((third, other))) for other in range(3) if other != third}
            if differ == mine:
                wrong.append((third, min(differ)))
        return wrong
    for first, second in all_pairs(units.number):
        if offsets[first] == offsets[second] and (first, second) in differ:
            wrong.append((first, (first, second)))
    # Of one unit's three computations, at least two pairs differ: that is one unit that disagrees with itself.
    return wrong[:1] if units.number == 1 else wrong


def _accuse(units: Units, unit: int, computation: int, seen: list[tuple[int, Difference]]) -> _Accusation:
    distance = _offsets(units.number)[computation]
    culprit = (unit + distance) % units.number
    first = _first(seen)
    earliest = [(rank, difference.point) for rank, difference in seen if difference.order == first]
    point = earliest[0][1]
    if len(earliest) == 1 and point.local:
        ranks: tuple[int, ...] = (units.counterpart(earliest[0][0], distance),)
    else:
        ranks = units.on_stage(culprit, point.stage)
    return _Accusation(unit, culprit, point, ranks)


def _verdict(units: Units, unit: int, accusations: list[_Accusation], of: str) -> Verdict:
    total = len(_offsets(units.number)) if units.outvote else units.number
    named = {each.ranks for each in accusations if len(each.ranks) == 1}
    # A point before a collective knows more than one behind it; two that know better contradict each other.
    if len(named) == 1:
        ranks: tuple[int, ...] = next(iter(named))
        point = next(each.point for each in accusations if each.ranks == ranks)
    else:
        ranks = tuple(sorted({rank for each in accusations for rank in each.ranks}))
        point = accusations[0].point
    always = units.outvote and len(accusations) == total
    whose = ", ".join(str(each) for each in sorted({each.micro_batch for each in accusations}))
    how = "was outvoted by two other units" if units.outvote else "did not repeat itself"
    evidence = (
        f"unit {unit} {how} in {len(accusations)} of {total} computations ({of} of unit {whose}), first at {point}"
    )
    kind: Literal["permanent", "intermittent"] = "permanent" if always else "intermittent"
    return Verdict(kind, unit, ranks, point, len(accusations) / total, evidence)


def _undecided(doubts: list[tuple[_Accusation, ...]], units: Units, of: str) -> Verdict:
    either, whose = doubts[0], ", ".join(str(each[0].micro_batch) for each in doubts)
    ranks = tuple(sorted({rank for each in either for rank in each.ranks}))
    why = "no two agree" if units.outvote else "each unit repeats itself"
    point = either[0].point
    evidence = f"the computations of the {of} of unit {whose} differ and {why}, first at {point}"
    return Verdict("undecided", None, ranks, point, 0.0, evidence)
