"""A pod's memory-backed volume: snapshots that outlive workers and agents, and are gone with the machine's power."""

from __future__ import annotations

from dataclasses import dataclass, field

from lockstep_api.messages import Copies, StateId, Term
from lockstep_trainer.protocol.lineage import order_of

OWN_BUFFERS = 3
BUDDY_BUFFERS = 2


@dataclass(eq=False)
class Snapshot:
    """The copies of one slot's ranks, of one state."""

    state: StateId
    slot: int
    durable: int
    nodes: int
    whole: bool = True
    """False while it is written: nobody may see it."""
    intact: bool = True
    """False: bits have flipped; whoever reads it finds out."""
    readers: set[object] = field(default_factory=set)
    """Agents that hold its lock; a dead one holds none."""

    @property
    def locked(self) -> bool:
        """Somebody alive reads it."""
        return any(getattr(reader, "alive", False) for reader in self.readers)


class Volume:
    """All snapshots of a pod, its own slot's and those that it keeps for others."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []  # oldest first
        self.kept: StateId | None = None
        self.pinned: StateId | None = None

    def find(self, state: StateId, slot: int) -> Snapshot | None:
        """A whole one."""
        return next((s for s in self.snapshots if s.whole and s.state == state and s.slot == slot), None)

    def holding(self, state: StateId) -> set[int]:
        """Of which slots there are whole ones."""
        return {s.slot for s in self.snapshots if s.whole and s.state == state}

    def copies(self) -> tuple[Copies, ...]:
        """What an agent sees that looks."""
        return tuple(Copies(s.state, s.slot, s.durable, s.nodes) for s in self.snapshots if s.whole)

    def begin(
        self, state: StateId, slot: int, durable: int, nodes: int, *, own: bool, keep: StateId | None = None
    ) -> Snapshot | None:
        """Take a buffer for a state: that of the oldest one, if it is older, and neither kept nor read. None where none
        is free."""
        held = {self.kept, self.pinned if own else keep}
        mine = [s for s in self.snapshots if s.slot == slot]
        if len(mine) >= (OWN_BUFFERS if own else BUDDY_BUFFERS):
            free = [s for s in mine if s.state not in held and not s.locked and order_of(s.state) < order_of(state)]
            if not free:
                return None
            self.snapshots.remove(min(free, key=lambda s: order_of(s.state)))
        fresh = Snapshot(state, slot, durable, nodes, whole=False)
        self.snapshots.append(fresh)
        return fresh

    def drop(self, term: Term, step: int) -> None:
        """Forget what is on no lineage."""
        self.snapshots = [
            s for s in self.snapshots if not (Term(s.state.epoch, s.state.generation) < term and s.state.step > step)
        ]

    def sweep(self) -> None:
        """Half-written ones whose writers are dead."""
        self.snapshots = [s for s in self.snapshots if s.whole]
