"""What the leader knows of snapshots in memory: who has staged and copied which state, and which one all keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lockstep_api.messages import Staged, StateId
from lockstep_trainer.protocol.lineage import order_of

KEEP_SECONDS = 120.0
"""Longer than this no state stays on its way to be kept, unless copies are slower than any network that trains."""


@dataclass(slots=True)
class Snapshots:
    """Mutable state of the leader; pure.

    A slot is at one state at a time and holds on to it until it is kept or void. A state is kept once all slots are at
    it and every buddy has it too; it is void once a slot is past it. What is asked at each message is counted along:
    each of thousands of members says two for each snapshot.
    """

    slots: int
    kept: StateId | None = None
    alone: str = ""
    """Why the kept state lacks copies at buddies; empty where it has them."""
    blocked: float = 0.0
    """Seconds that the newest kept snapshot held training up, the largest over slots."""
    at: dict[int, Staged] = field(default_factory=dict)
    """What each slot is at, by its newest word."""
    begun: float = 0.0
    """Since when a state is on its way to be kept, where ``at`` is not empty."""
    _states: Counter[StateId] = field(default_factory=Counter)
    """How many slots are at a state."""
    _lacking: set[int] = field(default_factory=set)
    """Slots whose buddies have no copy yet."""
    _gone: set[StateId] = field(default_factory=set)
    """States that some slot has lost."""

    def add(self, message: Staged, now: float) -> set[int]:
        """A slot has staged a state, or its buddy has it now, or it is lost. Returns whom to tell that what they are at
        is void: each slot once, and again where it says again what it is at."""
        if not self.at:
            self.begun = now
        known = self.at.get(message.slot)
        hopeful = {state for state in self._states if not self.void(state)}
        if known is None or _news(message) > _news(known):
            self.at[message.slot] = message
            self._count(known, message)
        fresh = {state for state in hopeful if self.void(state)}
        told = {slot for slot, said in self.at.items() if said.state in fresh} if fresh else set()
        return told | {message.slot} if self.void(self.at[message.slot].state) else told

    def void(self, state: StateId) -> bool:
        """Some slot is past it, or has lost it: it will never be on all."""
        return state in self._gone or any(order_of(other) > order_of(state) for other in self._states)

    def next(self, excused: Callable[[], Mapping[int, str]]) -> StateId | None:
        """The state that can be kept now. ``excused``: slots whose buddies are away, and why."""
        if len(self.at) < self.slots or len(self._states) > 1 or self._gone:
            return None
        reasons = excused() if self._lacking else {}
        if not self._lacking <= reasons.keys():
            return None
        self.kept = self.at[0].state
        self.alone = "; ".join(sorted({reasons[slot] for slot in self._lacking}))
        self.blocked = max(said.blocked for said in self.at.values())
        self._forget()
        return self.kept

    def stuck(self, now: float) -> str:
        """Why nothing was kept for so long, for people; empty where all is well."""
        if not self.at or now - self.begun < KEEP_SECONDS:
            return ""
        newest = max((said.state for said in self.at.values()), key=order_of)
        away = [slot for slot in range(self.slots) if slot not in self.at]
        lost = [slot for slot, said in sorted(self.at.items()) if said.gone]
        alone = [slot for slot, said in sorted(self.at.items()) if not said.copied and not said.gone]
        lacking = [f"slot {slot} has not staged it" for slot in away[:2]]
        lacking += [f"slot {slot} has lost it" for slot in lost[:2]]
        lacking += [f"slot {slot} has not brought its copy to its buddy" for slot in alone[:2]]
        reason = f"step {newest.step} waits: {', '.join(lacking)}"
        return f"no state was kept in memory for over {KEEP_SECONDS:.0f} s; {reason}"

    def begin(self, kept: StateId | None) -> None:
        """A new generation starts."""
        self._forget()
        self.kept = kept

    def _count(self, before: Staged | None, message: Staged) -> None:
        if before is not None:
            self._states[before.state] -= 1
            if not self._states[before.state]:
                del self._states[before.state]
                self._gone.discard(before.state)
        self._states[message.state] += 1
        if message.gone:
            self._gone.add(message.state)
        (self._lacking.discard if message.copied else self._lacking.add)(message.slot)

    def _forget(self) -> None:
        self.at.clear()
        self._states.clear()
        self._lacking.clear()
        self._gone.clear()


def _news(said: Staged) -> tuple[tuple[int, int, int], bool, bool]:
    """A slot's word replaces one that is less than this."""
    return order_of(said.state), said.gone, said.copied
