"""Messages between operator, leader and members.

Frozen dataclasses, so that protocol cores can use them without I/O libraries; ``lockstep_api.wire`` turns them into
JSON and back and refuses what does not fit. Each message names the job, epoch and generation it belongs to:
receivers compare (epoch, generation) first and drop what is older (PROTOCOLS: invariant a).

Directions::

    operator ── Membership, Stop, FaultAck ──────────► leader
    operator ◄─ Inventory, Progress, FaultReport, Recovered, ReplaceRequest, EpochRequest, Finished ── leader
    leader   ── Invite, Start, Abandon, Kept, Void, Upload, TakeSnapshot, Committed, Beat, Release ─► member
    leader   ◄─ Join, Quiesced, Steps, WorkerExited, Staged, Uploaded, UploadProblem, Leaving, Beat ── member
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# ------------------------------------------------------------------------------------------------ parts


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """(epoch, generation), ordered. Generation 0 means that no process group was started in the epoch yet."""

    epoch: int
    generation: int


@dataclass(frozen=True, slots=True)
class StateId:
    """Names a training state: the step, and the term whose workers made it. A step number alone names nothing."""

    step: int
    epoch: int
    generation: int


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """Who holds a slot."""

    slot: int
    pod: str
    pod_uid: str
    boot_id: str
    address: str  # host:port of the agent
    domain: str = ""  # failure domain: the node's name
    ordinal: int = 0


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """A durable checkpoint to start from: a manifest, and the checksum it must have."""

    state: StateId
    manifest: str  # key of manifest.json below the job's prefix, or a full URI for resumeFrom
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a step folder in the store."""

    name: str
    size: int  # bytes
    crc64nvme: str  # of all of it, 16 hex digits


@dataclass(frozen=True, slots=True)
class Copies:
    """A snapshot in an agent's memory-backed volume: whole for every rank of ``slot``, checksums not yet looked at."""

    state: StateId
    slot: int
    durable: int = 0  # step of the durable state whose samples the copy's log begins behind; 0: from the start


@dataclass(frozen=True, slots=True)
class Origin:
    """The newest Start that an agent obeyed, and the step that it began from. Snapshots beyond that step and of an
    older term are of no lineage: the agent removed them when it obeyed."""

    term: Term
    step: int


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """A snapshot to start from: one state id, and for each slot the agent that has its copy."""

    state: StateId
    sources: tuple[str, ...]  # by slot: host:port of the agent to fetch it from; "" where the slot's own pod has it


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the workers of one generation meet."""

    host: str
    port: int
    prefix: str  # "e/g": a worker joins only the prefix it was given


@dataclass(frozen=True, slots=True)
class StepSummary:
    """One optimizer step of one generation, folded over the ranks of a node, or of the job."""

    step: int  # 1 for the first optimizer step: the number of steps done after it
    at: float  # Unix seconds at its end
    seconds: float  # wall time of the step
    loss: float  # mean over all tokens, nats
    tokens: int  # over all ranks
    grad_norm: float
    lr: float
    sections: dict[str, float] = field(default_factory=dict)  # section → seconds, mean over ranks
    trained: int = 0  # tokens of all steps up to this one; 0: not said
    mfu: float | None = None  # model FLOPs utilisation, 0 to 1; None where the device's peak is not known
    memory: int = 0  # bytes in use at most on one device during the step, the largest over ranks; 0 without GPUs


# ------------------------------------------------------------------------------------ operator ↔ leader


@dataclass(frozen=True, slots=True)
class Membership:
    """Operator → agent of slot 0: these are the members of epoch ``epoch``, and you lead them."""

    job_uid: str
    epoch: int
    slots: tuple[SlotInfo, ...]
    spares: tuple[SlotInfo, ...] = ()
    cause: str = ""  # why the epoch was raised
    kind: Literal["Membership"] = "Membership"


@dataclass(frozen=True, slots=True)
class Stop:
    """Operator → leader: end the job's workers; pods will be deleted when ``Finished`` or a deadline comes."""

    job_uid: str
    epoch: int
    reason: str
    seconds: float = 0.0  # what a last checkpoint may take; 0: end at once
    kind: Literal["Stop"] = "Stop"


@dataclass(frozen=True, slots=True)
class FaultAck:
    """Operator → leader: faults up to this term are written in the job's status."""

    job_uid: str
    term: Term
    kind: Literal["FaultAck"] = "FaultAck"


@dataclass(frozen=True, slots=True)
class Inventory:
    """Any agent → operator or leader: who I am and what I last heard. First message on each operator stream, and
    the answer to GET /v1/inventory."""

    job_uid: str
    pod: str
    pod_uid: str
    boot_id: str
    term: Term  # highest ever seen
    leading: int | None  # epoch that this agent leads, if any
    slot: int | None
    running: Term | None  # generation whose workers run now
    step: int  # newest step seen
    leader_silent: float | None  # seconds since the leader was last heard; None: never had one
    container_starts: int  # starts of the container in this boot
    agent_starts: int
    origin: Origin | None = None
    snapshots: tuple[Copies, ...] = ()
    protocol: int = 1
    kind: Literal["Inventory"] = "Inventory"


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
    kind: Literal["Progress"] = "Progress"


@dataclass(frozen=True, slots=True)
class FaultReport:
    """Leader → operator: a fault handled inside the epoch. Sent again until acknowledged; ``term`` is the abandoned
    one, so faults are ordered and counted once."""

    job_uid: str
    term: Term
    at: float
    cause: str  # WorkerExited, AgentLost, StoreLost, Hang, ContainerRestarted, MemberLost
    rung: Literal["process", "container", "pod"]
    witness: str  # exit, stream, heartbeat, progress
    slot: int | None = None
    rank: int | None = None
    exit_code: int | None = None  # minus the signal
    detect_seconds: float = 0.0
    step: int = 0  # newest step when it happened
    log_tail: tuple[str, ...] = ()
    kind: Literal["FaultReport"] = "FaultReport"


@dataclass(frozen=True, slots=True)
class Recovered:
    """Leader → operator: the first new step after a fault. ``since`` is the newest term before it."""

    job_uid: str
    term: Term
    seconds: dict[str, float]  # decide, restart, restore, first_step, recompute
    steps_lost: int
    at: float
    kind: Literal["Recovered"] = "Recovered"


@dataclass(frozen=True, slots=True)
class ReplaceRequest:
    """Leader → operator: these members do not come back; give their slots to other pods."""

    job_uid: str
    epoch: int
    slots: tuple[int, ...]
    cause: str
    witness: str
    kind: Literal["ReplaceRequest"] = "ReplaceRequest"


@dataclass(frozen=True, slots=True)
class EpochRequest:
    """Agent → operator: raise the epoch (the leader's volume was empty: its generation numbers are lost)."""

    job_uid: str
    epoch: int
    cause: str
    kind: Literal["EpochRequest"] = "EpochRequest"


@dataclass(frozen=True, slots=True)
class Finished:
    """Leader → operator: the job has ended. Repeated until the stream is closed."""

    job_uid: str
    term: Term
    outcome: Literal["succeeded", "failed", "stopped"]
    reason: str  # CamelCase
    message: str
    kind: Literal["Finished"] = "Finished"


# -------------------------------------------------------------------------------------- leader ↔ member


@dataclass(frozen=True, slots=True)
class Invite:
    """Leader → member, by POST /v1/invite: open a stream to me and leave any older one."""

    job_uid: str
    epoch: int
    slot: int
    pod_uid: str  # of the invited pod: an address may have a new owner
    boot_id: str
    leader: str  # host:port
    spare: bool = False
    kind: Literal["Invite"] = "Invite"


@dataclass(frozen=True, slots=True)
class Join:
    """Member → leader, first message on its stream."""

    job_uid: str
    epoch: int
    slot: int
    inventory: Inventory
    cut: Cut | None = None
    kind: Literal["Join"] = "Join"


@dataclass(frozen=True, slots=True)
class Cut:
    """States that must not be used any more: all of ``excluded`` terms beyond ``keep``. Stored before it is
    answered; the highest (epoch, generation) wins."""

    term: Term  # the term that decided it
    keep: StateId
    excluded: tuple[tuple[Term, Term], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Start:
    """Leader → member: start your workers of this generation."""

    job_uid: str
    term: Term
    nodes: int
    gpus_per_node: int
    rendezvous: Rendezvous
    restore: RestorePoint | None  # None: fresh weights
    cut: Cut | None = None
    memory: MemoryPoint | None = None  # to be tried before ``restore``, which stands where a copy fails its checksum
    buddies: tuple[str, ...] = ()  # by slot: host:port of the agent that keeps copies of its snapshots; "" for none
    kind: Literal["Start"] = "Start"


@dataclass(frozen=True, slots=True)
class Abandon:
    """Leader → member: end the workers of this and every older generation, then say Quiesced."""

    job_uid: str
    term: Term
    cause: str
    kind: Literal["Abandon"] = "Abandon"


@dataclass(frozen=True, slots=True)
class Quiesced:
    """Member → leader: no worker of ``term`` or older is left, all are reaped; these snapshots are. Said again when
    they change."""

    job_uid: str
    term: Term
    slot: int
    origin: Origin | None = None
    snapshots: tuple[Copies, ...] = ()
    kind: Literal["Quiesced"] = "Quiesced"


@dataclass(frozen=True, slots=True)
class Steps:
    """Member → leader: steps that all its workers have finished since the last message, and where they are now."""

    job_uid: str
    term: Term
    slot: int
    done: tuple[StepSummary, ...]
    section: str  # of the slowest local worker: load, forward, backward, …
    kind: Literal["Steps"] = "Steps"


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """Member → leader: a worker process has ended."""

    job_uid: str
    term: Term
    slot: int
    rank: int  # global
    exit_code: int  # minus the signal
    error: str | None = None  # a sentence for people, where the worker left one
    user_error: bool = False  # bad configuration or data: a restart can't help
    log_tail: tuple[str, ...] = ()
    at: float = 0.0
    kind: Literal["WorkerExited"] = "WorkerExited"


@dataclass(frozen=True, slots=True)
class Staged:
    """Member → leader: every worker of the slot has this state in the pod's memory-backed volume; ``copied``: so has
    the slot's buddy, or there is none. Said again when ``copied`` turns true. A member is at one state at a time, and
    neither it nor its buddy lets go of that before Kept or Void: the leader may count on what it was told."""

    job_uid: str
    term: Term
    slot: int
    state: StateId
    copied: bool
    size: int = 0  # bytes of the slot's ranks
    blocked: float = 0.0  # seconds that training stood still for it, the largest over the slot's ranks
    kind: Literal["Staged"] = "Staged"


@dataclass(frozen=True, slots=True)
class Kept:
    """Leader → member: every rank's copy of this state is there: it is the one to keep until the next ``Kept``."""

    job_uid: str
    term: Term
    state: StateId
    kind: Literal["Kept"] = "Kept"


@dataclass(frozen=True, slots=True)
class Void:
    """Leader → member: another slot is past this staged state and will never have it, so that it is never kept."""

    job_uid: str
    term: Term
    state: StateId
    kind: Literal["Void"] = "Void"


@dataclass(frozen=True, slots=True)
class Upload:
    """Leader → member: bring this staged state to the store; it descends from ``parent``. A newer order replaces one
    that is not finished."""

    job_uid: str
    term: Term
    state: StateId
    parent: RestorePoint | None
    kind: Literal["Upload"] = "Upload"


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Member → leader: the slot's files of the step folder are in the store. ``header`` comes from the slot of rank 0:
    the manifest without its files, as JSON."""

    job_uid: str
    term: Term
    slot: int
    state: StateId
    files: tuple[StoredFile, ...]
    header: str | None = None
    kind: Literal["Uploaded"] = "Uploaded"


@dataclass(frozen=True, slots=True)
class UploadProblem:
    """Member → leader: the store does not take the slot's files at the moment; the agent goes on trying. ``gone``: the
    slot does not have this state any more, only another order helps."""

    job_uid: str
    term: Term
    slot: int
    state: StateId
    problem: str
    gone: bool = False
    kind: Literal["UploadProblem"] = "UploadProblem"


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Leader → member: ask the workers for a snapshot behind the step that they are in (they agree on it among
    themselves); a suspension or the end of a pod is near."""

    job_uid: str
    term: Term
    kind: Literal["TakeSnapshot"] = "TakeSnapshot"


@dataclass(frozen=True, slots=True)
class Leaving:
    """Member → leader: this pod was told to end (drain, preemption, deletion) and will be gone after ``seconds``."""

    job_uid: str
    term: Term
    slot: int
    seconds: float
    kind: Literal["Leaving"] = "Leaving"


@dataclass(frozen=True, slots=True)
class Committed:
    """Leader → member: this state is durable."""

    job_uid: str
    term: Term
    restore: RestorePoint
    kind: Literal["Committed"] = "Committed"


@dataclass(frozen=True, slots=True)
class Beat:
    """Either way, when there was nothing else to say for a while."""

    job_uid: str
    term: Term
    slot: int
    kind: Literal["Beat"] = "Beat"


@dataclass(frozen=True, slots=True)
class Release:
    """Leader → member: the job is over or you are no member; end your workers and wait to be deleted."""

    job_uid: str
    term: Term
    reason: str
    kind: Literal["Release"] = "Release"


ToLeader = Join | Quiesced | Steps | WorkerExited | Staged | Uploaded | UploadProblem | Leaving | Beat
ToMember = Start | Abandon | Kept | Void | Upload | TakeSnapshot | Committed | Beat | Release
FromOperator = Membership | Stop | FaultAck
ToOperator = Inventory | Progress | FaultReport | Recovered | ReplaceRequest | EpochRequest | Finished
Message = ToLeader | ToMember | FromOperator | ToOperator | Invite
