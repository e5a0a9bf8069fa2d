"""A generation makes no step any more: who keeps the others waiting. Pure.

The leader asks all members where their workers are, waits a moment for the answers, and then ends the generation with a
fault that names the rank. Evidence, the strongest first:

1. a process that was stopped, or is gone;
2. an interpreter that does not answer: some library holds its lock;
3. a rank that is behind in a collective which others have entered, and is not communicating itself;
4. a rank that is not communicating while all others are;
5. a rank that is behind in one group and waits in another one, for nobody who is behind (the wait-for graph's root).

Where none of these holds all ranks wait in their collectives: the fabric lost something, or ranks call collectives in
different orders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lockstep_api.messages import Position

EXAMINE_SECONDS = 3.0
"""How long the leader waits for the answers of all members: an agent gives its workers one second."""
_NAMED = 4
"""Ranks that a sentence names at most."""
_STOPPED = frozenset("TtZX")


@dataclass(slots=True)
class Examination:
    """Mutable state of the leader: one question to all members, and their answers."""

    at: float
    stepped_at: float
    """When the last step was made before it; a later one ends the examination."""
    answers: dict[int, tuple[Position, ...]] = field(default_factory=dict)

    def over(self, slots: int, now: float) -> bool:
        """All have answered, or it has been long enough."""
        return len(self.answers) >= slots or now - self.at >= EXAMINE_SECONDS


@dataclass(frozen=True, slots=True)
class Late:
    """A rank that has not entered the newest collective of a group, for which others wait there."""

    rank: int
    group: str
    op: str
    number: int
    waiting: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Blame:
    """What an examination found."""

    ranks: tuple[int, ...]
    """Who keeps the others waiting; empty where nobody can be named."""
    sentence: str
    late: tuple[Late, ...] = ()
    """The wait-for graph: in which groups they are waited for, and by whom."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where several ranks are alike."""

    ranks: tuple[int, ...]
    step: int
    section: str
    process: str
    answered: bool
    frames: tuple[str, ...]


def group_alike(positions: Iterable[Position]) -> list[Place]:
    """The places where ranks are, those of the fewest ranks first."""
    alike: defaultdict[tuple[int, str, str, bool, tuple[str, ...]], list[int]] = defaultdict(list)
    for each in positions:
        alike[each.step, each.section, each.process, each.answered, each.frames].append(each.rank)
    places = [Place(tuple(sorted(ranks)), *key) for key, ranks in alike.items()]
    return sorted(places, key=lambda place: (len(place.ranks), place.ranks))


def blame(positions: Iterable[Position]) -> Blame:
    """Who is to blame, by what the workers (all that could be asked) say."""
    at = {position.rank: position for position in positions}
    late = waits(at)
    behind = {each.rank for each in late}
    idle = {rank for rank, position in at.items() if position.answered and not position.communicating}
    waiting_for: defaultdict[int, set[int]] = defaultdict(set)
    for each in late:
        for rank in each.waiting:
            waiting_for[rank].add(each.rank)
    evidence: Sequence[set[int]] = (
        {rank for rank, position in at.items() if not position.process or position.process in _STOPPED},
        {rank for rank, position in at.items() if not position.answered},
        behind & idle,
        idle if len(idle) < len(at) else set(),
        {rank for rank in behind if not waiting_for[rank]},
    )
    named = tuple(sorted(next((ranks for ranks in evidence if ranks), set())))
    if not named:
        return Blame((), _nobody(at, late), late)
    return Blame(named, _sentence(named, at, late), late)


def waits(at: Mapping[int, Position]) -> tuple[Late, ...]:
    """Where somebody has not entered what others wait in."""
    found = []
    groups: defaultdict[str, dict[int, tuple[int, int, str]]] = defaultdict(dict)
    for position in at.values():
        for calls in position.groups:
            groups[calls.group][position.rank] = (calls.entered, calls.done, calls.op)
    for group, members in sorted(groups.items()):
        newest = max(entered for entered, _, _ in members.values())
        waiting = sorted(rank for rank, (entered, done, _) in members.items() if entered == newest > done)
        if not waiting:
            continue
        op = members[waiting[0]][2]
        for rank, (entered, _, _) in sorted(members.items()):
            if entered < newest:
                found.append(Late(rank, group, op, newest, tuple(waiting)))
    return tuple(found)


def _sentence(named: tuple[int, ...], at: Mapping[int, Position], late: Iterable[Late]) -> str:
    first = at[named[0]]
    who = f"rank {named[0]}" if len(named) == 1 else f"ranks {_listed(named)}"
    told = f"{who} {'keeps' if len(named) == 1 else 'keep'} the others waiting: {_where(first)}"
    missed = next((each for each in late if each.rank == first.rank), None)
    if missed:
        told += (
            f"; it never joined {missed.op or 'collective'} number {missed.number} of group {missed.group}, in which "
            f"{'rank' if len(missed.waiting) == 1 else 'ranks'} {_listed(missed.waiting)} "
            f"{'waits' if len(missed.waiting) == 1 else 'wait'}"
        )
    return told


def _where(position: Position) -> str:
    step = f"step {position.step + 1}, section {position.section}"
    if not position.process:
        return f"its process is gone ({step})"
    if position.process in _STOPPED:
        return f"its process is stopped ({step})"
    if not position.answered:
        blocked = ", in an uninterruptible call of the kernel" if position.process == "D" else ""
        return f"its interpreter does not answer{blocked} ({step})"
    frame = f" in {position.frames[0]}" if position.frames else ""
    return f"it is{frame} ({step})"


def _nobody(at: Mapping[int, Position], late: Sequence[Late]) -> str:
    if not at:
        return "no worker could be asked"
    if late:
        return (
            "all ranks wait in collectives, each for another: they call them in different orders "
            f"(rank {late[0].rank} has not joined {late[0].op} number {late[0].number} of group {late[0].group})"
        )
    inside_of = [calls for position in at.values() for calls in position.groups if calls.entered > calls.done]
    ops = sorted({f"{calls.op} of {calls.group}" for calls in inside_of})
    inside = f" ({', '.join(ops[:3])})" if ops else ""
    return f"all ranks wait in their collectives and none is behind{inside}: look at the network between the nodes"


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return ", ".join(map(str, ranks[:_NAMED])) + more
