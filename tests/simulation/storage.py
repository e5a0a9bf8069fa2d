"""The object store as the chain needs it: one pointer that is swapped under a condition, and calls that fail before or
after they took effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lockstep_api.messages import Cut, RestorePoint, StateId, StoredFile, Term
from lockstep_trainer.protocol.effects import Commit
from lockstep_trainer.protocol.lineage import term_of
from simulation.clockwork import Clockwork


@dataclass
class Entry:
    """A committed manifest."""

    point: RestorePoint
    parent: RestorePoint | None


class Superseded(Exception):
    """A newer term holds the chain."""


class Refused(Exception):
    """The state does not descend from the chain."""


class Missing(Exception):
    """A file of the state is not there."""


class Unavailable(Exception):
    """No answer; nobody knows what happened."""


@dataclass
class SimulatedStore:
    """``latest``, with its version, and all manifests."""

    clockwork: Clockwork
    nodes_of: Callable[[StateId], int] = lambda _: 1
    """On how many nodes the state was made."""
    folders: dict[StateId, dict[int, StoredFile]] = field(default_factory=dict)
    term: Term = Term(0, 0)  # noqa: RUF009  (frozen)
    newest: RestorePoint | None = None
    version: int = 0
    manifests: dict[str, Entry] = field(default_factory=dict)
    away: bool = False
    mute: bool = False
    """What is asked of ``latest`` takes effect, and nothing is answered."""
    on_lost: Callable[[], None] | None = None
    """Called once, when the answer to a commit is lost."""
    slowness: float = 0.0
    """Seconds more that a commit takes."""
    faulty: bool = True
    forgetful: bool = False
    """Of some states a file is lost before they are committed; once of each, and what is brought again stays."""
    forgot: set[StateId] = field(default_factory=set)
    on_commit: Callable[[RestorePoint, RestorePoint | None], None] = lambda *_: None

    def put(self, state: StateId, slot: int, file: StoredFile) -> None:
        """Files of one slot; what is there already stays as it is."""
        lost_answer = self._call(latest=False)
        known = self.folders.setdefault(state, {}).setdefault(slot, file)
        assert known == file, "put with other content"
        if self.forgetful and state not in self.forgot and self.clockwork.random.random() < 0.1:
            self.forgot.add(state)
            self.folders[state].pop(slot)
        if lost_answer:
            raise Unavailable

    def lineage(self) -> list[StateId]:
        """States on the chain, newest first."""
        states, point = [], self.newest
        while point is not None:
            states.append(point.state)
            point = self.manifests[point.manifest].parent
        return states

    def fence(self, term: Term, cut: Cut | None = None, at: RestorePoint | None = None) -> RestorePoint | None:
        """Take ``latest`` for this term, and move it behind what ``cut`` excludes and back to ``at``."""
        lost_answer = self._call(latest=True)
        if self.term > term:
            raise Superseded
        self.term = term
        while self.newest and cut and term_of(self.newest.state) <= cut.term and self.newest.state.step > cut.step:
            self.newest = self.manifests[self.newest.manifest].parent
        while self.newest and at and self.newest != at and at.state in self.lineage():
            self.newest = self.manifests[self.newest.manifest].parent
        self.version += 1
        if lost_answer:
            raise Unavailable
        return self.newest

    def commit(self, effect: Commit) -> RestorePoint:
        """Append a state to the chain."""
        state, parent, term = effect.state, effect.parent, effect.term
        lost_answer = self._call(latest=True)
        if self.term > term:
            raise Superseded
        assert self.term.epoch == term.epoch, "committed without a fence"
        assert (state.epoch, state.generation) <= (term.epoch, term.generation), "committed by an older term"
        whole = [self.folders[state].get(slot) for slot in range(self.nodes_of(state))]
        if state in self.forgot and None in whole:
            raise Missing
        assert sorted(effect.files, key=lambda file: file.name) == whole, "a torn folder"
        point = RestorePoint(state, f"step-{state.step}-e{state.epoch}-g{state.generation}", "sha")
        if point.state in self.lineage():
            return point
        if parent != self.newest and (parent is None or parent.state not in self.lineage()):
            raise Refused
        self.on_commit(point, parent)
        self.manifests[point.manifest] = Entry(point, parent)
        self.newest, self.term = point, term
        self.version += 1
        if lost_answer:
            told, self.on_lost = self.on_lost, None
            if told:
                told()
            raise Unavailable
        return point

    def _call(self, *, latest: bool) -> bool:
        """Raises Unavailable before any effect; True: the effect happens and its answer is lost."""
        if self.away:
            raise Unavailable
        if self.mute and latest:
            return True
        if self.faulty:
            chance = self.clockwork.random.random()
            if chance < 0.03:
                raise Unavailable
            return chance < 0.06
        return False
