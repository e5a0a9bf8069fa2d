"""What the leader knows of the chain: the newest durable state, the commit under way, and whether it can be trusted.

One commit at a time. While a commit has no answer nobody knows what ``latest`` names, so no restore point is chosen
either; where it ends without one (the store was away), the chain is asked again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_api.messages import RestorePoint, Saved, StateId, Term
from lockstep_trainer.protocol.effects import ChooseRestore, Commit, Effect

_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before a failed commit is tried again."""


@dataclass(slots=True)
class Durability:
    """Mutable state of the leader; ``enabled`` is false for jobs without checkpoints."""

    enabled: bool
    durable: RestorePoint | None = None
    durable_at: float | None = None
    uri: str | None = None
    problem: str | None = None
    known: bool = False
    """``durable`` is what the chain names: a generation may start from it."""
    superseded: bool = False
    _waiting: Saved | None = None
    _committing: Saved | None = None
    _asked: Term | None = None
    _failures: int = 0
    _retry_at: float = 0.0

    def __post_init__(self) -> None:
        self.known = not self.enabled

    @property
    def busy(self) -> bool:
        """A commit has no answer yet."""
        return self._committing is not None

    @property
    def pending(self) -> bool:
        """A whole step folder is not committed yet."""
        return self._committing is not None or self._waiting is not None

    def committed(self, state: StateId) -> bool:
        """That state, or one that descends from it, is durable."""
        return self.durable is not None and self.durable.state.step >= state.step and self.known

    def choose(self, term: Term) -> list[Effect]:
        """Ask the chain, once per term."""
        if self.known or self.busy or self.superseded or self._asked == term:
            return []
        self._asked = term
        return [ChooseRestore(term)]

    def chosen(self, term: Term, restore: RestorePoint | None, now: float) -> None:
        """The chain is fenced and has answered."""
        if term != self._asked:
            return
        self._asked = None
        self.known = True
        self.problem = None
        if restore != self.durable:
            self.durable, self.durable_at, self.uri = restore, now, None

    def saved(self, saved: Saved, now: float) -> list[Effect]:
        """A step folder is whole. A newer one takes the place of one that still waits."""
        if not self.enabled or self.superseded or self.committed(saved.state):
            return []
        newest = self._waiting or self._committing
        if newest and newest.state.step >= saved.state.step and newest.term == saved.term:
            return []
        self._waiting = saved
        return self.push(now)

    def push(self, now: float) -> list[Effect]:
        """Commit what waits, if nothing is under way and it is not too soon after a failure."""
        if self._waiting is None or self._committing or now < self._retry_at or self.superseded or not self.known:
            return []
        self._committing, self._waiting = self._waiting, None
        return [Commit(self._committing.term, self._committing.state, self._committing.listing)]

    def awaits(self, state: StateId) -> bool:
        """True where the commit under way is of this state. An answer to a commit of this agent's earlier epoch is
        none of ours: what it did, the fence has seen."""
        return self._committing is not None and self._committing.state == state

    def done(self, restore: RestorePoint, uri: str, now: float) -> None:
        """It is durable."""
        self.durable, self.durable_at, self.uri, self.problem = restore, now, uri, None
        self._committing = None
        self._failures = 0
        self._retry_at = 0.0

    def failed(self, problem: str, superseded: bool, now: float) -> None:
        """It is not, or nobody knows: it is tried again, unless another leader holds the chain."""
        self.problem = problem
        self.superseded = superseded
        if self._waiting is None:
            self._waiting = self._committing
        self._committing = None
        self._retry_at = now + _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        self._failures += 1

    def abandon(self) -> None:
        """The generation is over. A commit that has failed may have taken effect all the same: ask the chain."""
        if self.enabled and self._failures and self._committing is None:
            self.known = False
            self._waiting = None

    def begin(self) -> None:
        """A new generation starts: what older ones have not committed is not committed any more."""
        self._waiting = None
        self._failures = 0
        self._retry_at = 0.0
