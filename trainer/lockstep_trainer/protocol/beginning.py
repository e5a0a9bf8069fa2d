"""What the next generation begins from: a state in memory, what the chain names, or fresh weights.

While the store is away a new epoch begins from memory, **loose** of the chain: from a state that descends from the
newest durable one that the members know, the **anchor**. An earlier leader may have committed more than they know; when
the store is back, ``latest`` goes back to the anchor, and what they have made since can be committed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep_api.messages import Committed, Descent, MemoryPoint, RestorePoint, StateId, Upload
from lockstep_trainer.protocol.durability import Durability
from lockstep_trainer.protocol.effects import Effect
from lockstep_trainer.protocol.lineage import (
    Holding,
    is_cut_off,
    newest_complete,
    newest_elsewhere,
    origin_of,
    passed_over,
)

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader


def choose(leader: Leader, now: float) -> tuple[bool, MemoryPoint | None]:
    """Whether it is known what to start from, and the snapshot, where one is as new as the chain.

    Without an answer of the chain a generation may start from memory alone. In an epoch that has fenced it, so that
    nobody else has moved it, where all that it may name by now is an ancestor of the snapshot; before the fence where
    the members know an anchor.
    """
    keeping, durability = leader.keeping, leader.durability
    if not leader.plan.checkpoints:
        return True, None
    if keeping.uploads.shares:
        return False, None
    held, (anchor, astray) = _held(leader), _anchor(leader)
    durable = anchor if astray or not durability.fenced else durability.durable
    point = newest_complete(leader.membership.slots, held, durable, keeping.refused(), keeping.cut)
    if astray:
        return not _go_back(durability, anchor, point.state if point else None) and not durability.busy, None
    if durability.known:
        return not durability.busy, point
    if point is None or not durability.silent(now) or leader.verdicts.suspects:
        return False, None  # what is still to be judged is a cut, and the chain has to know of it first
    if not durability.fenced:
        return bool(anchor) and not is_cut_off(anchor, keeping.cut), point
    ancestors, origin = keeping.lineage.cut(point.state), origin_of(held)
    descends = (ancestors.holds(state) and not passed_over(state, origin) for state in durability.doubtful)
    return all(descends), point


def rescue(leader: Leader, now: float) -> list[Effect]:
    """Before the first generation of an epoch with another number of nodes: a state that only memory has, complete, is
    brought to the store by those that hold its shards, and begun from there."""
    keeping, durability = leader.keeping, leader.durability
    idle = durability.known and not durability.pending and not durability.superseded and keeping.uploads.order is None
    if not leader.plan.checkpoints or leader.generation or not idle:
        return []
    anchor, astray = _anchor(leader)
    durable = anchor if astray else durability.durable
    found = newest_elsewhere(leader.membership.slots, _held(leader), durable, keeping.refused(), keeping.cut)
    if astray:
        _go_back(durability, anchor, found.state if found else None)
    if found is None or astray:
        return []
    keeping.uploads.give(Upload(leader.plan.job_uid, leader.term, found.state, durability.durable), now, found.shares)
    orders = [(leader.roster.members[slot], keeping.uploads.order_for(slot)) for slot in found.shares]
    return [effect for peer, order in orders if order for effect in leader.roster.say(peer, order, now)]


def descent(leader: Leader) -> Descent | None:
    """What the newest generation that any member was in descends from, by the newest word of it. Of this epoch's the
    leader knows best."""
    if leader.generation:
        return Descent(leader.term, leader.durability.durable, loose=leader.durability.anchor is not None)
    told = (peer.descent for peer in leader.roster.members.values() if peer.descent)
    return max(
        told, key=lambda one: (one.term, not one.loose, one.durable.state.step if one.durable else 0), default=None
    )


def start_loose(leader: Leader, memory: MemoryPoint | None, now: float) -> list[Effect] | None:
    """What a generation that begins from ``memory`` asks of the store first; None where it is not loose."""
    durability, known = leader.durability, descent(leader)
    if memory is None or durability.known or durability.fenced or known is None or known.durable is None:
        return None
    return durability.start_loose(leader.term, known.durable, now)


def tied(leader: Leader, anchor: RestorePoint, now: float) -> list[Effect]:
    """The store is back, and the generation that started without it can be committed from now on; unless the chain does
    not lead to what it descends from."""
    if leader.durability.durable == anchor:
        return leader.roster.say_all(Committed(leader.plan.job_uid, leader.term, anchor), now)
    return leader.keeping.stale(leader, now)


def _held(leader: Leader) -> dict[int, Holding]:
    return {slot: Holding(peer.origin, peer.snapshots) for slot, peer in leader.roster.members.items()}


def _anchor(leader: Leader) -> tuple[RestorePoint | None, bool]:
    """The anchor, and whether the chain has gone on from there without what the members have made, while the store was
    away."""
    known, durability = descent(leader), leader.durability
    if known is None:
        return None, False
    return known.durable, durability.known and known.loose and known.durable != durability.durable


def _go_back(durability: Durability, anchor: RestorePoint | None, state: StateId | None) -> bool:
    """Whether the chain must go back to ``anchor``: for ``state``, which descends from that, where it is newer than
    what the chain names."""
    durable = durability.durable
    newer = state is not None and (durable is None or state.step > durable.state.step)
    if anchor is None or not newer or durability.left == anchor:
        return False
    if not durability.busy:
        durability.go_back(anchor)
    return True
