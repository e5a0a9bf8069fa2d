"""What the leader knows of snapshots in memory: who has staged and copied which state, and which one all keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lockstep_api.messages import Staged, StateId
from lockstep_trainer.protocol.lineage import order_of


@dataclass(slots=True)
class Snapshots:
    """Mutable state of the leader; pure.

    A slot is at one state at a time and holds on to it until it is kept or void. A state is kept once all slots are at
    it and every buddy has it too; it is void once a slot is past it.
    """

    slots: int
    kept: StateId | None = None
    alone: str = ""
    """Why the kept state lacks copies at buddies; empty where it has them."""
    blocked: float = 0.0
    """Seconds that the newest kept snapshot held training up, the largest over slots."""
    at: dict[int, Staged] = field(default_factory=dict)
    """What each slot is at, by its newest word."""

    def add(self, message: Staged) -> None:
        """A slot has staged a state, or its buddy has it now."""
        known = self.at.get(message.slot)
        if known is None or (order_of(message.state), message.copied) > (order_of(known.state), known.copied):
            self.at[message.slot] = message

    def void(self, state: StateId) -> bool:
        """Some slot is past it: it will never be on all."""
        return any(order_of(said.state) > order_of(state) for said in self.at.values())

    def next(self, excused: Mapping[int, str]) -> StateId | None:
        """The state that can be kept now. ``excused``: slots whose buddies are away, and why."""
        if len(self.at) < self.slots or len({said.state for said in self.at.values()}) > 1:
            return None
        lacking = {slot for slot, said in self.at.items() if not said.copied}
        if not lacking <= excused.keys():
            return None
        self.kept = self.at[0].state
        self.alone = "; ".join(sorted({excused[slot] for slot in lacking}))
        self.blocked = max(said.blocked for said in self.at.values())
        self.at.clear()
        return self.kept

    def begin(self, kept: StateId | None) -> None:
        """A new generation starts."""
        self.at.clear()
        self.kept = kept
