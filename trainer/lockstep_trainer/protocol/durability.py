"""What the leader knows of the chain: the newest durable state, the commit under way, and whether it can be trusted.

One commit at a time. While a commit has no answer nobody knows what ``latest`` names, so no restore point is chosen
either; where it ends without one (the store was away), the chain is asked again. A state may be committed by a later
generation than the one that made it, as long as that one descends from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lockstep_api.messages import Cut, RestorePoint, StateId, StoredFile, Term
from lockstep_trainer.protocol.effects import ChooseRestore, Commit, Effect
from lockstep_trainer.protocol.events import RestoreChosen
from lockstep_trainer.protocol.lineage import Lineage, excluded, is_cut_off

_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before a failed commit is tried again."""
_LOST_TRIES = 4
"""So many commits in a row must miss files before those count as lost, which takes 7 s: a network file system may show
other nodes a file as it was seconds ago (NFS: acregmin, 3 s)."""
PATIENCE_SECONDS = 5.0
"""How long the chain may leave a question open before a generation starts from memory without the answer."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A step folder that is whole in the store: what becomes its manifest."""

    state: StateId
    parent: RestorePoint | None
    header: str
    files: tuple[StoredFile, ...]


@dataclass(slots=True)
class Durability:
    """Mutable state of the leader; ``enabled`` is false for jobs without checkpoints."""

    enabled: bool
    durable: RestorePoint | None = None
    durable_at: float | None = None
    uri: str | None = None
    verified: tuple[str, ...] = ()
    """Checks that ``durable`` passed, where this leader has committed it."""
    problem: str | None = None
    known: bool = False
    """``durable`` is what the chain names: a generation may start from it."""
    fenced: bool = False
    """The chain was fenced in this epoch: nobody but this leader has moved it since."""
    superseded: bool = False
    doubtful: set[StateId] = field(default_factory=set)
    """Commits without an answer: the chain may name one of them."""
    cut: Cut | None = None
    """What must not be started from any more, durable or not."""
    anchor: RestorePoint | None = None
    """To what ``latest`` is to go back: a generation started without the chain and descends from this."""
    left: RestorePoint | None = None
    """An anchor that the chain does not lead to any more."""
    agreed: int | None = None
    """The last step whose replay agreed; None: none did, or nobody looks."""
    _waiting: Pending | None = None
    _committing: Pending | None = None
    _epoch: int = 0
    """Of the commit under way."""
    _asked: Term | None = None
    _asked_at: float = 0.0
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

    def choose(self, term: Term, now: float) -> list[Effect]:
        """Ask the chain, once per term."""
        if self.known or self.busy or self.superseded or self._asked == term:
            return []
        self._asked, self._asked_at = term, now
        return [ChooseRestore(term, self.cut, self.anchor)]

    def go_back(self, anchor: RestorePoint) -> None:
        """The members' states descend from ``anchor``, and from nothing that the chain names beyond it."""
        self.anchor, self._asked = anchor, None
        self.known = self.fenced = False

    def start_loose(self, term: Term, anchor: RestorePoint, now: float) -> list[Effect]:
        """A generation starts while the store is away: from a state that descends from ``anchor``. When the store is
        back, ``latest`` goes to that, though it may name more."""
        self.found(anchor, now)
        if self.anchor == anchor and self._asked is not None:
            return []
        self.anchor, self._asked, self._asked_at = anchor, term, now
        return [ChooseRestore(term, self.cut, anchor)]

    def chosen(self, answer: RestoreChosen, now: float) -> bool:
        """The chain is fenced and has answered; false: to a question of another term, or without the newest cut."""
        if answer.term != self._asked:
            return False
        restore = answer.restore
        self._asked = None
        if is_cut_off(restore, self.cut):
            return False
        self.known = self.fenced = True
        self.left = self.anchor if self.anchor != restore else None
        self.anchor = None
        self.problem = None
        self.doubtful.clear()
        if restore != self.durable or self.uri is None:
            self.found(restore, now)
            self.durable_at, self.uri, self.verified = answer.at or now, answer.uri, answer.verified
        if self._waiting and (self.committed(self._waiting.state) or self._waiting.parent != restore):
            self._waiting = None
        return True

    def found(self, restore: RestorePoint | None, now: float) -> None:
        """It is what the job has, and this leader did not make it: an ancestor of what is corrupt, say."""
        uri = self._uri_of(restore) if restore else None
        self.durable, self.durable_at, self.uri, self.verified = restore, now, uri, ()

    def _uri_of(self, restore: RestorePoint) -> str | None:
        """Manifests of a job lie below one prefix; another job's are named in full."""
        if "://" in restore.manifest:
            return restore.manifest
        if self.durable is None or self.uri is None or not self.uri.endswith(self.durable.manifest):
            return None
        return self.uri.removesuffix(self.durable.manifest) + restore.manifest

    def silent(self, now: float) -> bool:
        """The chain leaves a question open for long."""
        return self._asked is not None and not self.busy and now - self._asked_at >= PATIENCE_SECONDS

    def ready(self, pending: Pending, term: Term, now: float) -> list[Effect]:
        """A step folder is whole."""
        if not self.enabled or self.superseded or self.committed(pending.state):
            return []
        if self._committing and self._committing.state == pending.state:
            return []
        self._waiting = pending
        return self.push(term, now)

    def push(self, term: Term, now: float) -> list[Effect]:
        """Commit what waits, if nothing is under way and it is not too soon after a failure."""
        if self._waiting is None or self._committing or now < self._retry_at or self.superseded or not self.known:
            return []
        this, self._waiting = self._waiting, None
        self._committing, self._epoch = this, term.epoch
        self.doubtful.add(this.state)
        return [Commit(term, this.state, this.parent, this.header, this.files, self.agreed)]

    def awaits(self, state: StateId, term: Term) -> bool:
        """True where this is the commit under way. An answer to a commit of this agent's earlier epoch is none of ours,
        of the same state or not: what it did, the fence has seen, and what it did not, the fence has forbidden."""
        return self._committing is not None and (self._committing.state, self._epoch) == (state, term.epoch)

    def done(self, restore: RestorePoint, uri: str, verified: tuple[str, ...], now: float) -> None:
        """It is durable."""
        self.durable, self.durable_at, self.uri, self.verified, self.problem = restore, now, uri, verified, None
        self.doubtful.clear()
        self._committing = None
        self._failures = 0
        self._retry_at = 0.0
        self._forget_what_is_cut_off()

    def failed(self, problem: str, superseded: bool, now: float, *, lost: bool = False) -> bool:
        """It is not, or nobody knows: it is tried again, unless another leader holds the chain. ``lost``: files of it
        are not in the store; True where they count as lost by now and it is not tried again."""
        self.problem = problem
        self.superseded = superseded
        given_up = lost and self._failures + 1 >= _LOST_TRIES
        if self._waiting is None and not given_up:
            self._waiting = self._committing
        self._committing = None
        # What comes next is another state, or other files.
        self._retry_at = now if given_up else now + _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        self._failures += 1
        self._forget_what_is_cut_off()
        return given_up

    def exclude(self, cut: Cut) -> None:
        """The generation is over, and these states must not be started from: the chain goes back behind them."""
        self.cut = cut
        self._forget_what_is_cut_off()

    def _forget_what_is_cut_off(self) -> None:
        if self._waiting and excluded(self._waiting.state, self.cut):
            self._waiting = None
        named = is_cut_off(self.durable, self.cut) or any(excluded(state, self.cut) for state in self.doubtful)
        if self.enabled and named:  # the chain may name it, and must not be passed over
            self.known = self.fenced = False

    def abandon(self) -> None:
        """The generation is over. A commit that has failed may have taken effect all the same: ask the chain."""
        if self.enabled and self._failures and self._committing is None:
            self.known = False

    def begin(self, lineage: Lineage) -> None:
        """A new generation starts: what it does not descend from is not committed any more."""
        if self._waiting and not lineage.holds(self._waiting.state):
            self._waiting = None
        if self._waiting is None:
            self._failures = 0
            self._retry_at = 0.0
