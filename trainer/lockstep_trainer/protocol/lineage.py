"""Which states the running generation descends from, and which copies in memory may be started from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lockstep_api.messages import Copies, Cut, MemoryPoint, Origin, RestorePoint, SlotInfo, Start, StateId, Term

_NO_END = 1 << 62


def term_of(state: StateId) -> Term:
    """The generation whose workers made it."""
    return Term(state.epoch, state.generation)


def order_of(state: StateId) -> tuple[int, int, int]:
    """Sorts the states of one lineage, and those of a member's time: a later generation's come later."""
    return (state.epoch, state.generation, state.step)


def excluded(state: StateId, cut: Cut | None) -> bool:
    """Whether ``cut`` forbids to start from that state."""
    return cut is not None and term_of(state) <= cut.term and state.step > cut.step


def is_cut_off(point: RestorePoint | None, cut: Cut | None) -> bool:
    """The same of a durable state. Another job's is what this one begins with: no cut of this one speaks of it."""
    return point is not None and "://" not in point.manifest and excluded(point.state, cut)


def newer_cut(one: Cut | None, other: Cut | None) -> Cut | None:
    """That of the higher term."""
    if one is None or other is None:
        return one or other
    return other if other.term > one.term else one


@dataclass(frozen=True, slots=True)
class Lineage:
    """For each generation the step up to which its states are ancestors; the newest one's own have no bound yet."""

    bounds: tuple[tuple[Term, int], ...] = ()

    def holds(self, state: StateId) -> bool:
        """True where ``state`` is of the newest generation, or an ancestor of what that began from."""
        term = term_of(state)
        return any(term == other and state.step <= bound for other, bound in self.bounds)

    def cut(self, begun: StateId | None) -> Lineage:
        """The ancestors of ``begun``, itself included; None: fresh weights, they have none."""
        if begun is None:
            return Lineage()
        origin = term_of(begun)
        return Lineage((*((term, bound) for term, bound in self.bounds if term < origin), (origin, begun.step)))

    def up_to(self, step: int) -> Lineage:
        """Without the states beyond that step."""
        return Lineage(tuple((term, min(bound, step)) for term, bound in self.bounds))

    def without(self, term: Term) -> Lineage:
        """Without the states of that generation."""
        return Lineage(tuple((other, bound) for other, bound in self.bounds if other != term))

    def grown(self, term: Term, begun: StateId | None) -> Lineage:
        """With a new generation, which begins from ``begun``."""
        return Lineage((*self.cut(begun).bounds, (term, _NO_END)))


@dataclass(frozen=True, slots=True)
class Holding:
    """What one agent's volume holds."""

    origin: Origin | None
    copies: tuple[Copies, ...]


def newest_complete(
    slots: Iterable[SlotInfo],
    holdings: Mapping[int, Holding],
    durable: RestorePoint | None,
    refused: Iterable[StateId] = (),
    cut: Cut | None = None,
) -> MemoryPoint | None:
    """The newest state that every slot has a copy of, at home or at any member, that is ``durable`` or newer and that
    ``cut`` allows. What is durable, too, is begun from memory where it is there: that is nearer.

    ``holdings`` are by the slot that the agent holds now. Only copies that the newest origin among them admits count:
    a pod that was away for a generation may hold what all others have dropped, and what it holds descends from nothing
    that they have done since. For the same reason a copy must not be older, by its term, than the durable state that it
    is to descend from; and the log of samples in it must reach back to that state. A copy that another number of nodes
    has made holds other shards: it can't be started from as it is.
    """
    members = sorted(slots, key=lambda info: info.slot)
    origin = origin_of(holdings)
    since = durable.state.step if durable else 0
    places: dict[StateId, dict[int, set[int]]] = {}
    for holder, held in holdings.items():
        for copy in held.copies:
            fits = copy.nodes in (0, len(members)) and copy.durable <= since
            same = durable is not None and copy.state == durable.state and not passed_over(copy.state, origin)
            if fits and _admits(origin, copy.state) and (same or _descends(copy.state, durable, origin)):
                places.setdefault(copy.state, {}).setdefault(copy.slot, set()).add(holder)
    whole = [state for state, found in places.items() if len(found) == len(members)]
    whole = [state for state in whole if state not in set(refused) and not excluded(state, cut)]
    if not whole:
        return None
    state = max(whole, key=lambda state: (state.step, order_of(state)))
    address = {info.slot: info.address for info in members}
    found = places[state]
    sources = ("" if info.slot in found[info.slot] else address[min(found[info.slot])] for info in members)
    return MemoryPoint(state, tuple(sources))


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A state that another number of nodes has made, of which every slot has a copy somewhere."""

    state: StateId
    shares: Mapping[int, tuple[int, ...]]
    """Slot of a member → slots of the old nodes whose copies it holds and brings to the store."""


def newest_elsewhere(
    slots: Iterable[SlotInfo],
    holdings: Mapping[int, Holding],
    durable: RestorePoint | None,
    refused: Iterable[StateId] = (),
    cut: Cut | None = None,
) -> Elsewhere | None:
    """As ``newest_complete``, of the states that another number of nodes has made: no worker can begin from it, but
    the store can have it, and from there it is loaded at any number of nodes."""
    nodes = len(tuple(slots))
    origin = origin_of(holdings)
    since = durable.state.step if durable else 0
    places: dict[tuple[StateId, int], dict[int, list[int]]] = {}
    for holder, held in sorted(holdings.items()):
        for copy in held.copies:
            if copy.nodes in (0, nodes) or copy.state in set(refused) or copy.durable > since:
                continue
            if excluded(copy.state, cut):
                continue
            if _admits(origin, copy.state) and _descends(copy.state, durable, origin):
                places.setdefault((copy.state, copy.nodes), {}).setdefault(copy.slot, []).append(holder)
    whole = [(state, made_by) for (state, made_by), found in places.items() if len(found) == made_by]
    if not whole:
        return None
    state, made_by = max(whole, key=lambda pair: (pair[0].step, order_of(pair[0])))
    shares: dict[int, list[int]] = {}
    for slot, holders in sorted(places[state, made_by].items()):
        holder = min(holders, key=lambda holder: (len(shares.get(holder, ())), holder))
        shares.setdefault(holder, []).append(slot)
    return Elsewhere(state, {holder: tuple(each) for holder, each in shares.items()})


def origin_of(holdings: Mapping[int, Holding]) -> Origin | None:
    """What the newest generation that anybody was in really began from."""
    return max((held.origin for held in holdings.values() if held.origin), key=lambda o: o.term, default=None)


def passed_over(state: StateId, origin: Origin | None) -> bool:
    """True where the newest generation began from an older state than this one of a generation before it: its workers
    could not begin from a snapshot, and that became durable behind their backs. What they made does not descend from
    it."""
    return origin is not None and term_of(state) < origin.term and origin.step < state.step


def _admits(origin: Origin | None, state: StateId) -> bool:
    return origin is None or term_of(state) >= origin.term or state.step <= origin.step


def _descends(state: StateId, durable: RestorePoint | None, origin: Origin | None) -> bool:
    if durable is None:
        return True
    if passed_over(durable.state, origin):
        return False
    return state.step > durable.state.step and term_of(state) >= term_of(durable.state)


def buddies(slots: Iterable[SlotInfo]) -> tuple[str, ...]:
    """By slot, the address of the agent that keeps copies of its snapshots.

    Always in another failure domain where there is one, else in another pod; "" where there is no other pod. Each agent
    keeps the copies of one slot as long as no domain has more than half of the slots: with the slots in order of their
    domains, the largest first, each takes the one that stands as far behind it as the largest domain is long.
    """
    members = sorted(slots, key=lambda info: info.slot)
    domains: dict[str, list[SlotInfo]] = {}
    for info in members:
        domains.setdefault(info.domain or f"pod {info.pod_uid}", []).append(info)
    groups = sorted(domains.values(), key=lambda group: (-len(group), group[0].slot))
    ring = [info for group in groups for info in group]
    place = {info.slot: (number, spot) for number, group in enumerate(groups) for spot, info in enumerate(group)}
    shift = len(groups[0]) if len(groups) > 1 else 1
    chosen: dict[int, str] = {}
    for position, info in enumerate(ring):
        buddy = ring[(position + shift) % len(ring)]
        number, spot = place[info.slot]
        if len(groups) > 1 and place[buddy.slot][0] == number:  # more than half of the slots are in its domain
            others = [other for other in ring if place[other.slot][0] != number]
            buddy = others[spot % len(others)]
        chosen[info.slot] = "" if buddy is info else buddy.address
    return tuple(chosen[info.slot] for info in members)


def begun_from(start: Start) -> StateId | None:
    """The state that a generation begins from, if its workers can do as they were told; None: fresh weights."""
    if start.memory is not None:
        return start.memory.state
    return start.restore.state if start.restore else None
