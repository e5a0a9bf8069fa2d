"""Values that messages and protocol cores are made of."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    nodes: int = 0  # that trained when it was made: at another number a slot's ranks hold other shards; 0: not said


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
class Doubt:
    """A step on which units disagreed, and nobody can say who is wrong: it is made again, and compared."""

    step: int
    points: tuple[str, ...]  # where it showed first: compared in a generation's first step too


@dataclass(frozen=True, slots=True)
class Aside:
    """A pod that was put aside for a spare, to see whether it was wrong."""

    slot: int
    pod: str
    node: str
    ranks: tuple[int, ...]  # those of its ranks that were among the accused
    devices: tuple[str, ...]  # their GPUs, where they are known


@dataclass(frozen=True, slots=True)
class Dispute:
    """Units disagree, and nobody can say who is wrong: what is known of it, and what was tried."""

    since: int  # the first step that disagreed
    step: int  # the last: it is made again, and the dispute is over once it, or one behind it, agrees
    seen: int  # how often a step disagreed
    points: tuple[str, ...]  # where it showed first
    ranks: tuple[int, ...]  # of which some are wrong
    pods: tuple[str, ...]  # of these ranks, when they last disagreed
    nodes: int  # that the job trained on: on more or fewer, ranks are others
    calibration: bool  # it began at a generation's first step: it may be a library that adds up in another order
    evidence: str
    aside: tuple[Aside, ...] = ()  # in order: the spare of the last one computes in its place now
    excused: bool = False  # it was such a library: what a first step shows is looked into no more


@dataclass(frozen=True, slots=True)
class Cut:
    """States that must not be used any more, though they are whole: those beyond ``step`` that ``term`` or an older one
    made. Stored before it is answered; that of the highest term counts."""

    term: Term  # the generation that was ended by it
    step: int
    reason: str
    dispute: Dispute | None = None  # why, where nobody can say who is wrong


@dataclass(frozen=True, slots=True)
class Descent:
    """What a generation of this member's descends from in the store."""

    term: Term
    durable: RestorePoint | None
    """What its Start named, or what was committed since; None: fresh weights."""
    loose: bool = False
    """It started while the store was away: what an earlier leader has committed since ``durable`` is on no lineage."""


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


@dataclass(frozen=True, slots=True)
class RankWork:
    """One rank's own work in one optimizer step: waiting for other ranks is left out."""

    rank: int  # global
    step: int
    compute: float  # seconds in its windows of computation
    data: float  # seconds that it waited for its batch
    tokens: int  # that it computed
    squares: int  # Σ length² over the documents that it computed
    product: float | None = None  # seconds of the matrix product that its device is measured by; None: not measured now
    copy: float | None = None  # the same for the copy within its memory
    host: float = 0.0  # seconds that its device waited because its host stood still
    garbage: float = 0.0  # of the host's standstill: seconds that it collected garbage
    throttled: float = 0.0  # seconds that a quota held up its container's processes, over all CPUs
    waited: dict[str, float] = field(default_factory=dict)  # dimension of the mesh → seconds in its collectives
    peer: int | None = None  # rank that it exchanged data with, to measure their links; None: not measured now
    link: float | None = None  # seconds that this took
    clock: float | None = None  # MHz that its device runs at; None: not known


@dataclass(frozen=True, slots=True)
class SlowVerdict:
    """Ranks that are slow, or were; what names nobody is of the whole job."""

    cause: str  # Clock, Memory, Compute, Host, Network, Data, Pauses, PipelineImbalance, LengthImbalance
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]  # of these ranks; none where no node is to blame
    since: int  # step at which it began, as far as can be told
    slowdown: float  # how much longer what is slow takes than it should: 0.3 is 30 %
    cost: float  # share of the job's step time that it loses, 0 to 1
    evidence: str
    at: float  # Unix seconds at which it was found
    ended: float | None = None  # Unix seconds at which it was seen to be over


@dataclass(frozen=True, slots=True)
class CorruptVerdict:
    """Ranks that computed wrong numbers; where it is undecided, ranks of which some did."""

    kind: str  # Permanent, Intermittent, Undecided
    ranks: tuple[int, ...]  # one; more where all that is known is that it is among them
    pods: tuple[str, ...]  # of these ranks
    nodes: tuple[str, ...]
    devices: tuple[str, ...]  # GPUs of these ranks, by serial number and UUID, where they are known
    since: int  # step at which it was first found
    step: int  # and last
    seen: int  # on how many steps
    confidence: float  # share of their computations that were wrong when they were last looked at; 0 where undecided
    evidence: str
    at: float  # Unix seconds at which it was first found
    ended: float | None = None  # Unix seconds at which they were put aside, or were under suspicion no more


@dataclass(frozen=True, slots=True)
class OutlierVerdict:
    """A figure of the whole job that is far above what it lately was, or was."""

    signal: str  # loss, gradientNorm, updateSize
    since: int  # step at which it began
    evidence: str
    at: float  # Unix seconds at which it was found
    ended: float | None = None  # Unix seconds at which it was usual again, or a generation began


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault that somebody has made on purpose, by ``lockstep inject``."""

    id: str  # 12 hex digits
    rank: int  # global
    at: float  # Unix seconds at which it was ordered
    what: str  # a clause without a full stop
    node: str = ""  # of the rank, as the leader knows it
