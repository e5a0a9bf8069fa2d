"""How the job goes and how it ends: between leader and operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lockstep_api.messages.parts import (
    CorruptVerdict,
    Injection,
    OutlierVerdict,
    RestorePoint,
    SlowVerdict,
    StateId,
    StepSummary,
    Term,
)


@dataclass(frozen=True, slots=True)
class Progress:
    """Leader → operator, at a bounded rate. Ledger totals are cumulative within the epoch."""

    job_uid: str
    term: Term
    sequence: int
    state: Literal["forming", "starting", "running", "recovering", "finishing"]
    connected: int  # members with a stream
    steps: int | None  # steps in all
    newest: StepSummary | None
    tokens_per_second: float | None
    tokens: int  # trained on up to `newest`, on the lineage
    eval_loss: float | None
    durable: RestorePoint | None
    durable_at: float | None  # Unix seconds
    durable_uri: str | None  # the manifest's full URI
    checkpoint_problem: str | None  # why checkpoints can't be made durable at the moment
    ledger: dict[str, float]  # class → GPU-seconds, members only
    kept: StateId | None = None  # newest state that all slots keep in memory
    cadence: dict[str, float] = field(default_factory=dict)  # interval of durable states and its inputs, in seconds
    durable_verified: tuple[str, ...] = ()  # checks that `durable` passed before it was written, by its manifest
    slow: tuple[SlowVerdict, ...] = ()  # the newest, those that are over among them
    corrupt: tuple[CorruptVerdict, ...] = ()  # likewise
    outliers: tuple[OutlierVerdict, ...] = ()  # likewise
    injected: tuple[Injection, ...] = ()  # the newest
    other_data: str = ""  # up to which step training was done on other data than the job's, and what differs
    kind: Literal["Progress"] = "Progress"


@dataclass(frozen=True, slots=True)
class FaultReport:
    """Leader → operator: a fault handled inside the epoch. Sent again until acknowledged; ``term`` is the abandoned
    one, so faults are ordered and counted once."""

    job_uid: str
    term: Term
    at: float
    cause: str  # WorkerExited, AgentLost, StoreLost, Hang, ContainerRestarted, MemberLost, Corruption
    rung: Literal["inProcess", "process", "container", "pod"]
    witness: str  # exit, stream, heartbeat, progress, arbiter
    slot: int | None = None
    rank: int | None = None
    exit_code: int | None = None  # minus the signal
    detect_seconds: float = 0.0
    step: int = 0  # newest step when it happened
    log_tail: tuple[str, ...] = ()  # see tails.tail
    message: str = ""  # what is known of it, a sentence for people
    blame: Literal["", "Suspected", "Named"] = ""  # of the node: its GPU or fabric may be at fault; a rule says it is
    kind: Literal["FaultReport"] = "FaultReport"


@dataclass(frozen=True, slots=True)
class FaultAck:
    """Operator → leader: faults up to this term are written in the job's status."""

    job_uid: str
    term: Term
    spares: int | None = None  # pods without a slot that run; None: an operator that does not tell
    kind: Literal["FaultAck"] = "FaultAck"


@dataclass(frozen=True, slots=True)
class Recovered:
    """Leader → operator: the first new step after a fault. ``since`` is the newest term before it."""

    job_uid: str
    term: Term
    seconds: dict[str, float]  # decide, restart, restore, first_step, recompute
    steps_lost: int
    at: float
    source: str = ""  # where its state was: memory, buddy (the memory of another pod), store; "": nowhere, or not said
    kind: Literal["Recovered"] = "Recovered"


@dataclass(frozen=True, slots=True)
class Stop:
    """Operator → leader: end the job's workers; pods will be deleted when ``Finished`` or a deadline comes."""

    job_uid: str
    epoch: int
    reason: str
    seconds: float = 0.0  # what a last checkpoint may take; 0: end at once
    hold: bool = False  # nothing presses: workers make no step beyond that checkpoint
    kind: Literal["Stop"] = "Stop"


@dataclass(frozen=True, slots=True)
class Finished:
    """Leader → operator: the job has ended. Repeated until the stream is closed."""

    job_uid: str
    term: Term
    outcome: Literal["succeeded", "failed", "stopped"]
    reason: str  # CamelCase
    message: str
    kind: Literal["Finished"] = "Finished"
