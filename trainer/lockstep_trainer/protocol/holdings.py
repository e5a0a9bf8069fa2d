"""A member's snapshots: what its slot has staged, what it brings to its buddy and to the store, what it says of that.

It is at one state at a time: from staging on that is pinned, copied, and promised to the leader once the buddy has it;
only when it is kept, or will never be, does the newest state that was staged since take its place. Were a promise taken
back, the leader might call a state kept whose copy is being overwritten.

All that the leader must hear is said again until it is acknowledged; the shell is asked again after the agent's death.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lockstep_api.messages import (
    Copies,
    Cut,
    Descent,
    Kept,
    Leaving,
    Origin,
    RestorePoint,
    Staged,
    Start,
    StateId,
    StoredFile,
    Term,
    ToLeader,
    Upload,
    Uploaded,
    UploadProblem,
)
from lockstep_trainer.protocol.effects import (
    CopySnapshot,
    DropSnapshots,
    Effect,
    KeepSnapshot,
    Persist,
    PinSnapshot,
    UploadState,
)
from lockstep_trainer.protocol.events import PodEnding, StateCopied, StateStaged, StateUploaded, UploadFailed
from lockstep_trainer.protocol.lineage import newer_cut, order_of, term_of


@dataclass(frozen=True, slots=True)
class StagedState:
    """The newest state that all workers of the slot have staged."""

    state: StateId
    copied: bool
    size: int = 0
    blocked: float = 0.0


@dataclass(frozen=True, slots=True)
class UploadOrder:
    """The newest order, and what came of it."""

    order: Upload
    files: tuple[StoredFile, ...] | None = None
    """None: not all are in the store yet."""
    header: str | None = None
    gone: str = ""
    """Why the state can't be uploaded any more."""


@dataclass(frozen=True, slots=True)
class HoldingsMemory:
    """What must be remembered over the agent's death."""

    origin: Origin | None = None
    buddy: str = ""
    staged: StagedState | None = None
    """What the slot is at."""
    later: StagedState | None = None
    """The newest that was staged since."""
    gone: StateId | None = None
    """What the slot was at last, where it has lost that before its buddy had it, and is at nothing newer."""
    kept: StateId | None = None
    upload: UploadOrder | None = None
    cut: Cut | None = None
    """The newest that a leader has told of."""
    descent: Descent | None = None
    """Of the newest generation; None: its workers did not begin from what they were told to."""


class Holdings:
    """The state of one member's snapshots; its methods return effects."""

    def __init__(self, memory: HoldingsMemory) -> None:
        self.memory = memory
        self.copies: tuple[Copies, ...] = ()
        self._own: frozenset[StateId] = frozenset()
        """States of this slot's own ranks."""
        self._again: Start | None = None
        """A start from a snapshot that this slot has still to fetch."""
        self._problem: UploadFailed | None = None
        self._gone_at: float | None = None

    def resume(self, running: Start | None) -> list[Effect]:
        """After the agent's own death, which may have come between any two effects: what was decided holds again, and
        what was under way is begun again."""
        self._again = running if running and running.memory else None
        effects: list[Effect] = []
        if origin := self.memory.origin:
            effects.append(DropSnapshots(origin.term, origin.step))
        if kept := self.memory.kept:
            effects.append(KeepSnapshot(kept))
        if staged := self.memory.staged:
            effects.append(PinSnapshot(staged.state))
        effects += self._copy()
        if (upload := self.memory.upload) and upload.files is None and not upload.gone:
            effects.append(_upload(upload.order))
        return effects

    def says(self, job_uid: str, term: Term, slot: int, now: float) -> list[ToLeader]:
        """What the leader has not acknowledged."""
        said: list[ToLeader] = []
        if staged := self.memory.staged:
            said.append(Staged(job_uid, term, slot, staged.state, staged.copied, staged.size, staged.blocked))
        elif self.memory.gone:
            said.append(Staged(job_uid, term, slot, self.memory.gone, copied=False, gone=True))
        if upload := self.memory.upload:
            state = upload.order.state
            if upload.files is not None:
                order = upload.order
                said.append(Uploaded(job_uid, term, slot, state, upload.files, upload.header, order.slots, order.again))
            elif upload.gone:
                said.append(UploadProblem(job_uid, term, slot, state, upload.gone, gone=True))
            elif self._problem and self._problem.state == state:
                said.append(UploadProblem(job_uid, term, slot, state, self._problem.problem))
        if self._gone_at is not None:
            said.append(Leaving(job_uid, term, slot, round(max(0.0, self._gone_at - now), 3)))
        return said

    # -------------------------------------------------------------------------------- from the leader

    def started(self, start: Start, slot: int, *, moved: bool = False) -> list[Effect]:
        """A Start is obeyed: before anything runs, what is on no lineage any more is forgotten, and what the generation
        begins from is not overwritten. ``moved``: the last one's ranks were of another slot."""
        begun = start.memory.state if start.memory else start.restore.state if start.restore else None
        step = begun.step if begun else 0
        upload = self.memory.upload
        if upload and (moved or upload.order.state.step > step):
            upload = None  # of no lineage, or of other ranks
        buddy = start.buddies[slot] if start.buddies else ""
        cut = newer_cut(self.memory.cut, start.cut)
        descent = Descent(start.term, start.restore, start.loose)
        self.memory = HoldingsMemory(Origin(start.term, step), buddy, upload=upload, cut=cut, descent=descent)
        self._again = start if start.memory else None
        effects: list[Effect] = [DropSnapshots(start.term, step)]
        if start.memory:
            self.memory = replace(self.memory, kept=start.memory.state)
            effects.append(KeepSnapshot(start.memory.state))
        return effects

    def heard_cut(self, cut: Cut | None) -> list[Effect]:
        """It is written down before it is answered: the leader that comes next may know it only from here. What it
        excludes goes with the next Start."""
        newest = newer_cut(self.memory.cut, cut)
        if newest == self.memory.cut:
            return []
        self.memory = replace(self.memory, cut=newest)
        return [Persist()]

    def fell_back(self, first: int) -> list[Effect]:
        """The workers' first step shows that they began earlier than ordered: a copy was corrupt."""
        origin = self.memory.origin
        if origin is None or first > origin.step:
            return []
        upload = self.memory.upload
        if upload and upload.order.state.step >= first:
            upload = None
        staged, later = self.memory.staged, self.memory.later
        if staged and term_of(staged.state) != origin.term:
            staged, later = later, None
        kept, descent = Origin(origin.term, first - 1), self.memory.descent
        if descent and descent.durable and descent.durable.state.step >= first:
            descent = None  # nor from what is durable: its files were corrupt
        self.memory = replace(self.memory, origin=kept, staged=staged, later=later, upload=upload, descent=descent)
        self._again = None
        return [Persist(), DropSnapshots(origin.term, first - 1)]

    def kept_by_all(self, message: Kept) -> list[Effect]:
        """Every slot has this state: the one to keep from now on."""
        kept, staged = self.memory.kept, self.memory.staged
        if kept is not None and order_of(message.state) < order_of(kept):
            return []
        at = staged.state if staged else self.memory.gone
        done = at is not None and order_of(at) <= order_of(message.state)
        if kept == message.state and not done:
            return []
        self.memory = replace(self.memory, kept=message.state)
        first: list[Effect] = [Persist(), KeepSnapshot(message.state)]
        return [*first, *(self._go_to_later() if done else [])]

    def void(self, state: StateId) -> list[Effect]:
        """What the slot is at will never be kept."""
        staged = self.memory.staged
        return self._go_to_later() if staged and staged.state == state else []

    def ordered(self, order: Upload) -> list[Effect]:
        """Bring a state to the store: the newest order counts."""
        known = self.memory.upload
        if known and not _gives_way(known, order) and _age(order) <= _age(known.order):
            return []  # said again: so is the answer
        self._problem = None
        upload = _upload(order)
        if known and replace(known.order, term=order.term) == order:
            self.memory = replace(self.memory, upload=replace(known, order=order, gone=""))
            return [Persist()] if known.files is not None else [Persist(), upload]
        self.memory = replace(self.memory, upload=UploadOrder(order))
        return [Persist(), upload]

    def committed(self, restore: RestorePoint) -> list[Effect]:
        """This state is durable: so is what it descends from."""
        if (upload := self.memory.upload) and upload.order.state.step <= restore.state.step:
            self.memory = replace(self.memory, upload=None)
        if (descent := self.memory.descent) and (descent.durable != restore or descent.loose):
            self.memory = replace(self.memory, descent=Descent(descent.term, restore))
            return [Persist()]
        return []

    # --------------------------------------------------------------------------------- from the shell

    def staged(self, event: StateStaged) -> list[Effect]:
        """All local workers have staged a state of the newest generation."""
        origin, staged, later = self.memory.origin, self.memory.staged, self.memory.later
        if origin is None or event.term != origin.term or term_of(event.state) != event.term:
            return []
        known = [self.memory.kept, staged and staged.state, later and later.state]
        if any(order_of(event.state) <= order_of(other) for other in known if other):
            return []  # told again by a new agent's shell
        fresh = StagedState(event.state, not self.memory.buddy, event.size, event.blocked)
        self._own |= {event.state}
        self.memory = replace(self.memory, later=fresh)
        return self._go_to_later() if staged is None else [Persist()]

    def copied(self, event: StateCopied) -> list[Effect]:
        """The buddy has verified its copy."""
        staged = self.memory.staged
        if staged is None or staged.state != event.state or staged.copied:
            return []
        self.memory = replace(self.memory, staged=replace(staged, copied=True))
        return [Persist()]

    def held(self, copies: tuple[Copies, ...], slot: int | None) -> list[Effect]:
        """What the volume holds. Once the slot has what its generation began from, its buddy is brought it again."""
        self.copies, self._own = copies, frozenset(copy.state for copy in copies if copy.slot == slot)
        start, staged = self._again, self.memory.staged
        if staged and not staged.copied and staged.state not in self._own:
            return self._go_to_later(staged.state)  # damaged; or overwritten before it was pinned, the agent was away
        if start is None or start.memory is None:
            return []
        state = start.memory.state
        if state not in self._own:
            return []
        self._again = None
        if self.memory.staged or self.memory.kept != state:
            return []  # there is a newer one by now
        self.memory = replace(self.memory, later=StagedState(state, not self.memory.buddy))
        return self._go_to_later()

    def uploaded(self, event: StateUploaded) -> list[Effect]:
        """The slot's files are in the store."""
        upload = self.memory.upload
        if upload is None or upload.order.state != event.state or upload.files is not None:
            return []
        self.memory = replace(self.memory, upload=replace(upload, files=event.files, header=event.header))
        return [Persist()]

    def failed(self, event: UploadFailed) -> list[Effect]:
        """A try to upload has failed."""
        upload = self.memory.upload
        if upload is None or upload.order.state != event.state or upload.files is not None:
            return []
        self._problem = event
        if not event.gone:
            return []
        self.memory = replace(self.memory, upload=replace(upload, gone=event.problem))
        return [Persist()]

    def ending(self, event: PodEnding, now: float) -> list[Effect]:
        """The pod was told to end."""
        self._gone_at = now + event.seconds
        return []

    def _go_to_later(self, gone: StateId | None = None) -> list[Effect]:
        """``gone``: what the slot was at is lost."""
        later = self.memory.later
        staged = later if later and later.state in self._own else None
        gone = None if staged else later.state if later else gone
        self.memory = replace(self.memory, staged=staged, later=None, gone=gone)
        return [Persist(), *([PinSnapshot(staged.state)] if staged else []), *self._copy()]

    def _copy(self) -> list[Effect]:
        staged = self.memory.staged
        if staged is None or staged.copied:
            return []
        return [CopySnapshot(staged.state, self.memory.buddy, self.memory.kept)]


def _gives_way(known: UploadOrder, order: Upload) -> bool:
    """Whether an order of the same leader counts although its state is not newer: to bring the same again, behind one
    for a state that is gone, and wherever a few members bring the copies of all, since another one's copy of the newer
    state may be damaged."""
    if order.again and not known.order.again and order.state == known.order.state:
        return True
    if order.slots:
        return (order.state, order.slots) != (known.order.state, known.order.slots)
    return bool(known.gone) and order.state != known.order.state


def _age(order: Upload) -> tuple[Term, tuple[int, int, int]]:
    return order.term, order_of(order.state)


def _upload(order: Upload) -> UploadState:
    return UploadState(order.term, order.state, order.parent, order.slots)
