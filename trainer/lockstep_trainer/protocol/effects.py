"""What a core asks of its shell. Effects of one event are carried out in order; Persist before what follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lockstep_api.messages import (
    Cut,
    Invite,
    RestorePoint,
    Start,
    StateId,
    StoredFile,
    Term,
    ToLeader,
    ToMember,
    ToOperator,
)


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Open a stream to this leader and leave any older one; keep trying until told otherwise."""

    leader: str  # host:port
    epoch: int


@dataclass(frozen=True, slots=True)
class CloseStream:
    """Leave the stream."""


@dataclass(frozen=True, slots=True)
class SendLeader:
    """Send on the member's stream; lost where it is closed."""

    message: ToLeader


@dataclass(frozen=True, slots=True)
class Launch:
    """Start this node's workers, in processes that rest where there are some, unless the order wants fresh ones. Each
    of them ends in exactly one WorkerEnded, also one that could not be started, or is idle first."""

    start: Start
    slot: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Have the workers of this and every older generation leave it. Each of them ends (WorkerEnded), or rests until the
    next Launch (WorkerIdle); one that does neither within seconds is killed. Said again while one is missing."""

    term: Term


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the workers of this and every older generation, also those that rest."""

    term: Term


@dataclass(frozen=True, slots=True)
class ExamineWorkers:
    """Ask the workers of this generation where they are; answered by WorkersExamined within a second or so."""

    term: Term


@dataclass(frozen=True, slots=True)
class Persist:
    """Write the node's memory to its volume before the next effect."""


@dataclass(frozen=True, slots=True)
class PostInvite:
    """Leader: ask the agent at this address to open a stream."""

    address: str
    invite: Invite


@dataclass(frozen=True, slots=True)
class SendMember:
    """Leader: send on this stream."""

    connection: int
    message: ToMember


@dataclass(frozen=True, slots=True)
class DropMember:
    """Leader: close this stream."""

    connection: int


@dataclass(frozen=True, slots=True)
class SendOperator:
    """Leader: send to the operator; lost where it is not connected."""

    message: ToOperator


@dataclass(frozen=True, slots=True)
class ChooseRestore:
    """Leader: fence the chain to this term and name the newest restore point; answered by RestoreChosen or
    RestoreUnavailable. What ``cut`` excludes leaves the chain: ``latest`` goes back behind it, and to ``at`` where it
    leads to that."""

    term: Term
    cut: Cut | None = None
    at: RestorePoint | None = None


@dataclass(frozen=True, slots=True)
class EnsureStore:
    """Leader: have a rendezvous store, or a free port where workers bring their own; answered by StoreReady or, now or
    later, StoreLost."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Leader: make a manifest of ``header`` (JSON, a manifest without files and parent) and the files, and swap
    ``latest`` from ``parent`` to it; answered by CommitDone or CommitFailed. ``state`` may be of an older term than
    ``term``, which is the one that has the fence."""

    term: Term
    state: StateId
    parent: RestorePoint | None
    header: str
    files: tuple[StoredFile, ...]
    agreed: int | None = None  # the newest state that is not beyond this step is not removed: see ``rollback``


@dataclass(frozen=True, slots=True)
class Journal:
    """Leader: a line of the run's journal; ``at`` and the term are in it."""

    line: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CopySnapshot:
    """Bring this state of this node's ranks to the buddy; answered by StateCopied, once, when the buddy has verified
    it. The shell goes on trying; a newer copy replaces one that is not finished. Where this node's own bytes fail their
    checksum it removes the snapshot instead: SnapshotsHeld, then, says that it is gone."""

    state: StateId
    buddy: str  # host:port of its agent
    keep: StateId | None = None  # the buddy must not take the buffer with its copy of this state for it


@dataclass(frozen=True, slots=True)
class KeepSnapshot:
    """This state is complete on all nodes: no worker may overwrite it (nor this node's copies of it for a buddy) until
    the next one is kept."""

    state: StateId


@dataclass(frozen=True, slots=True)
class PinSnapshot:
    """This state is on its way to be kept: no worker of this node may overwrite it either, until another one is pinned
    or it is kept. It stays pinned when the agent dies."""

    state: StateId


@dataclass(frozen=True, slots=True)
class DropSnapshots:
    """Forget snapshots beyond ``step`` that a term before ``term`` made: they are on no lineage any more."""

    term: Term
    step: int


@dataclass(frozen=True, slots=True)
class UploadState:
    """Bring this staged state to the store; answered by StateUploaded, and by UploadFailed as often as a try fails. The
    shell goes on trying until another order comes."""

    term: Term
    state: StateId
    parent: RestorePoint | None
    slots: tuple[int, ...] = ()
    """Whose ranks' copies, its own or those that it keeps for a buddy; empty: those of the slot that it works for."""


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """Ask this node's workers of ``term`` for a snapshot as soon as may be."""

    term: Term
    hold: bool = False
    """They make no step behind it."""


Effect = (
    OpenStream | CloseStream | SendLeader | Launch | Leave | Kill | Persist
    | PostInvite | SendMember | DropMember | SendOperator | ChooseRestore | EnsureStore | Commit | Journal
    | CopySnapshot | PinSnapshot | KeepSnapshot | DropSnapshots | UploadState | RequestSnapshot
    | ExamineWorkers
)  # fmt: skip
