"""What a core asks of its shell. Effects of one event are carried out in order; Persist before what follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lockstep_api.messages import Invite, Start, StateId, Term, ToLeader, ToMember, ToOperator


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
    """Start this node's workers. Each of them ends in exactly one WorkerEnded, also one that could not be started."""

    start: Start
    slot: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the workers of this and every older generation."""

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
    RestoreUnavailable."""

    term: Term


@dataclass(frozen=True, slots=True)
class EnsureStore:
    """Leader: have a rendezvous store, or a free port where workers bring their own; answered by StoreReady or, now or
    later, StoreLost."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Leader: turn a listing into a manifest and swap ``latest``; answered by CommitDone or CommitFailed."""

    term: Term
    state: StateId
    listing: str


@dataclass(frozen=True, slots=True)
class Journal:
    """Leader: a line of the run's journal; ``at`` and the term are in it."""

    line: dict[str, Any]


Effect = (
    OpenStream | CloseStream | SendLeader | Launch | Kill | Persist
    | PostInvite | SendMember | DropMember | SendOperator | ChooseRestore | EnsureStore | Commit | Journal
)  # fmt: skip
