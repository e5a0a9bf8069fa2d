"""What a shell tells its core. Every one of them may come late, twice or for a generation long gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lockstep_api.messages import (
    Copies,
    FromOperator,
    Injection,
    Inventory,
    Invite,
    Join,
    Position,
    RankWork,
    RestorePoint,
    StateId,
    StepSummary,
    StoredFile,
    Term,
    ToLeader,
    ToMember,
)


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; at least four times a second."""


# ------------------------------------------------------------------------------------------------ member


@dataclass(frozen=True, slots=True)
class Invited:
    """A leader asks for a stream."""

    invite: Invite


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The stream to this epoch's leader is open."""

    epoch: int


@dataclass(frozen=True, slots=True)
class StreamClosed:
    """It is closed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class LeaderSaid:
    """A message on it."""

    epoch: int
    message: ToMember


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A worker of this node has ended and was reaped, or could not be started."""

    term: Term
    rank: int
    exit_code: int
    at: float
    error: str | None = None
    user_error: bool = False
    log_tail: tuple[str, ...] = ()
    ours: bool = True
    """Where a SIGKILL ended it: it was its agent's, as far as that knows."""


@dataclass(frozen=True, slots=True)
class WorkerIdle:
    """A worker of this node is out of its generation, for good, and waits to be told to go on or to end. ``error``: it
    left unasked, since it lost a peer."""

    term: Term
    rank: int
    at: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class WorkersStepped:
    """All local workers have finished these steps (none: they are only somewhere else)."""

    term: Term
    done: tuple[StepSummary, ...]
    section: str
    work: tuple[RankWork, ...] = ()  # of single workers since the last one, where it is measured


@dataclass(frozen=True, slots=True)
class WorkersExamined:
    """Where the workers of this generation are, as far as they or the kernel say it."""

    term: Term
    positions: tuple[Position, ...]


@dataclass(frozen=True, slots=True)
class StateStaged:
    """Every worker of this node has copied this state to the memory-backed volume."""

    term: Term
    state: StateId
    size: int = 0  # bytes of all local ranks
    blocked: float = 0.0  # seconds, largest over local ranks


@dataclass(frozen=True, slots=True)
class StateCopied:
    """The buddy has it too, and has verified it."""

    state: StateId


@dataclass(frozen=True, slots=True)
class StateUploaded:
    """This node's files of the step folder are in the store."""

    state: StateId
    files: tuple[StoredFile, ...]
    header: str | None


@dataclass(frozen=True, slots=True)
class UploadFailed:
    """A try has failed; another will come, unless ``gone``: the volume does not hold the state any more."""

    state: StateId
    problem: str
    gone: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotsHeld:
    """Which snapshots this node's volume holds: told at the agent's start, whenever that changes, and as it is once no
    worker of a generation is left, before the last WorkerEnded: a restore is chosen by it."""

    copies: tuple[Copies, ...]


@dataclass(frozen=True, slots=True)
class Warmed:
    """The zygote has imported all that workers need, or has died."""

    warm: bool


@dataclass(frozen=True, slots=True)
class FaultOrdered:
    """Somebody has ordered a fault of a worker of this node; it comes next."""

    injection: Injection


@dataclass(frozen=True, slots=True)
class PodEnding:
    """This pod was told to end and has so many seconds left."""

    seconds: float


# ------------------------------------------------------------------------------------------------ leader


@dataclass(frozen=True, slots=True)
class OperatorConnected:
    """The operator opened a stream to this agent."""


@dataclass(frozen=True, slots=True)
class OperatorClosed:
    """It is gone."""


@dataclass(frozen=True, slots=True)
class OperatorSaid:
    """A message on it."""

    message: FromOperator


@dataclass(frozen=True, slots=True)
class MemberConnected:
    """A stream with this first message. ``connection`` numbers streams; a later one replaces an earlier one."""

    connection: int
    join: Join


@dataclass(frozen=True, slots=True)
class MemberClosed:
    """A stream is closed."""

    connection: int


@dataclass(frozen=True, slots=True)
class MemberSaid:
    """A message on a stream."""

    connection: int
    message: ToLeader


@dataclass(frozen=True, slots=True)
class InviteRefused:
    """The agent at a member's address is not that member; this is who it is."""

    slot: int
    inventory: Inventory


@dataclass(frozen=True, slots=True)
class RestoreChosen:
    """The chain is fenced to ``term``; this is its newest state, None: there is none yet. What else is said of it is
    for people, and only of a state of this job."""

    term: Term
    restore: RestorePoint | None
    uri: str | None = None
    at: float | None = None  # when it was written, Unix seconds
    verified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RestoreUnavailable:
    """The chain can't be read; the shell goes on trying and this is why it has no answer yet. ``fatal``: never will."""

    term: Term
    problem: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class StoreReady:
    """Workers can meet here."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class StoreLost:
    """The store is dead or could not be started."""

    problem: str


@dataclass(frozen=True, slots=True)
class CommitDone:
    """``latest`` names this state."""

    term: Term  # of the commit
    restore: RestorePoint
    uri: str = ""
    seconds: float = 0.0
    size: int = 0
    verified: tuple[str, ...] = ()  # checks that it passed, by its manifest


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """It does not, or nobody knows. ``superseded``: a newer term holds the chain and this leader must never commit
    again. ``lost``: a file of the state is not in the store as it was uploaded."""

    term: Term  # of the commit
    state: StateId
    problem: str
    superseded: bool = False
    lost: bool = False


@dataclass(frozen=True, slots=True)
class WorkerReported:
    """A line that rank 0 left in events.jsonl: an evaluation, a generated text, a restore time."""

    line: dict[str, Any]


MemberEvent = (
    Tick | Invited | StreamOpened | StreamClosed | LeaderSaid | WorkerEnded | WorkerIdle | WorkersStepped
    | StateStaged | StateCopied | StateUploaded | UploadFailed | SnapshotsHeld | Warmed | PodEnding
    | WorkersExamined | FaultOrdered
)  # fmt: skip
LeaderEvent = (
    Tick | OperatorConnected | OperatorClosed | OperatorSaid | MemberConnected | MemberClosed | MemberSaid
    | InviteRefused | RestoreChosen | RestoreUnavailable | StoreReady | StoreLost | CommitDone | CommitFailed
    | WorkerReported
)  # fmt: skip
Event = MemberEvent | LeaderEvent
