"""Which checkpoints stay and which leftovers go. Pure functions: they decide, ``garbage`` deletes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from lockstep_api.messages import StateId, Term


@dataclass(frozen=True, slots=True)
class Keep:
    """``checkpoint.keep``."""

    last: int = 3
    every: int | None = None
    verified: int | None = None
    """No field of the job's: the last step whose replay agreed. The newest whole state that is not beyond it stays, as
    a rollback goes there."""


@dataclass(frozen=True, slots=True)
class Member:
    """A state on the chain. ``whole``: its manifest can be read and each file that it names is there, as long as it
    should be."""

    state: StateId
    readable: bool
    whole: bool


@dataclass(frozen=True, slots=True)
class Folder:
    """A step folder in the store."""

    name: str
    state: StateId
    modified: float  # Unix seconds: its newest file


@dataclass(frozen=True, slots=True)
class Store:
    """What is known of a job's store when something is to be deleted.

    ``chain`` is what ``latest`` leads to, newest first; ``fence`` is the term that ``latest`` carries.
    """

    chain: Sequence[Member]
    fence: Term
    now: float  # Unix seconds
    grace: float = 600.0  # seconds in which what was touched is left alone

    def dead(self, state: StateId, touched: float) -> bool:
        """Whether a state off the chain can never come onto it, and nobody is at work on it any more.

        It belongs to a term before the fence; and since uploads outlive their term, and a newer one may commit them, it
        must be older than the chain's newest state, too: then no commit takes it. While a manifest of the chain can't
        be read nothing is dead: it may be the part that is out of sight.
        """
        return (
            bool(self.chain)
            and all(member.readable for member in self.chain)
            and all(member.state != state for member in self.chain)
            and _made(state) < self.fence
            and (_made(state), state.step) < (_made(self.chain[0].state), self.chain[0].state.step)
            and touched < self.now - self.grace
        )

    def over(self, state: StateId, touched: float) -> bool:
        """Whether nothing is uploaded for this state any more: it is dead, or whole on the chain."""
        on_chain = any(member.state == state for member in self.chain)
        return self.dead(state, touched) or (on_chain and touched < self.now - self.grace)


def _made(state: StateId) -> Term:
    return Term(state.epoch, state.generation)


def window(chain: Sequence[Member], last: int) -> int:
    """How many of the chain's newest states stay whatever their step: the newest ``last`` whole ones, and all that is
    newer than the oldest of them. All of it where there are fewer."""
    whole = 0
    for number, member in enumerate(chain, 1):
        whole += member.whole
        if whole == last:
            return number
    return len(chain)


def kept(chain: Sequence[Member], keep: Keep) -> frozenset[StateId]:
    """The states of the chain (newest first) that stay.

    Those in the window, so that the newest whole one always does; the newest whole one that is verified; for each
    multiple of ``keep.every`` the first whole one at or behind it; and one that can't be read where nothing readable is
    older, since what lies behind it is out of sight.
    """
    stay = {member.state for member in chain[: window(chain, keep.last)]}
    if keep.verified is not None:
        verified = (member.state for member in chain if member.whole and member.state.step <= keep.verified)
        stay.update(islice(verified, 1))
    if keep.every is not None:
        reached = 0
        for member in reversed(chain):
            multiple = member.state.step // keep.every
            if member.whole and multiple > reached:
                reached = multiple
                stay.add(member.state)
    for member in reversed(chain):
        if member.readable:
            break
        stay.add(member.state)
    return frozenset(stay)


def disposable(folders: Iterable[Folder], store: Store, keep: Keep) -> tuple[Folder, ...]:
    """The folders to remove, the lowest step first: on the chain what retention does not keep, off it what is dead."""
    stay, on_chain = kept(store.chain, keep), {member.state for member in store.chain}
    gone = [
        folder
        for folder in folders
        if (folder.state not in stay if folder.state in on_chain else store.dead(folder.state, folder.modified))
    ]
    return tuple(sorted(gone, key=lambda folder: (folder.state.step, folder.name)))
