"""What the operator says of a job."""

from __future__ import annotations

from enum import StrEnum

from pydantic import ConfigDict, Field

from lockstep_api.v1alpha1.base import Model


class Phase(StrEnum):
    """One word for where the job stands."""

    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended for good."""
        return self in (Phase.SUCCEEDED, Phase.FAILED)


class StatusModel(Model):
    """Base of the status: like Model, but fields of a newer operator are passed over."""

    model_config = ConfigDict(extra="ignore")


class Condition(StatusModel):
    """metav1.Condition."""

    type: str
    """Type in CamelCase."""
    status: str = Field(pattern="^(True|False|Unknown)$")
    """True, False or Unknown."""
    reason: str = ""
    """Reason in CamelCase."""
    message: str = ""
    """A sentence."""
    last_transition_time: str
    """RFC 3339 time at which status changed."""
    observed_generation: int | None = None
    """metadata.generation that it speaks of."""


class Members(StatusModel):
    """Pods by role."""

    ready: int = 0
    """Members that hold a slot in the current epoch and are connected."""
    spares: int = 0
    """Warm spares."""
    starting: int = 0
    """Pods that are not up yet."""


class Progress(StatusModel):
    """How far training is."""

    step: int = 0
    """Optimizer steps done."""
    steps: int | None = None
    """Steps in all."""
    tokens: int = 0
    """Tokens trained on, recomputed ones left out."""
    loss: float | None = None
    """Mean training loss of the last step, in nats per token."""
    eval_loss: float | None = None
    """Loss on held-out files, in nats per token."""
    tokens_per_second: float | None = None
    """Over the last steps."""
    mfu: float | None = None
    """Model FLOPs utilisation of the last step, 0 to 1: the model's own FLOPs as a share of the GPUs' peak."""
    other_data: str | None = None
    """Up to which step training was done on other data than the job's, and what differs: it began from another job's
    checkpoint, or data.onChange is Accept."""
    at: str | None = None
    """When this was seen, RFC 3339."""


class DurableCheckpoint(StatusModel):
    """The newest checkpoint that a fault can't take away."""

    step: int
    """Step."""
    uri: str
    """Its manifest."""
    at: str
    """When it was committed, RFC 3339."""
    verified: list[str] | None = None
    """Checks that the state passed before it was written."""


class MemorySnapshot(StatusModel):
    """The newest state that every rank has in memory, with its second copy where it has a buddy."""

    step: int
    """Step."""
    at: str
    """When this was so for all ranks, RFC 3339."""


class CheckpointInterval(StatusModel):
    """How often durable checkpoints are made, and what that was chosen from."""

    steps: int
    """Steps between them."""
    seconds: float | None = None
    """The same as time."""
    cost_seconds: float | None = None
    """What one costs: seconds that training stands still or is slowed down."""
    mtbf_seconds: float | None = None
    """Mean time between faults of this job."""
    formula: str | None = None
    """How steps was chosen: fixed (checkpoint.every), or the formula's name."""


class CheckpointStatus(StatusModel):
    """Checkpoints."""

    durable: DurableCheckpoint | None = None
    """Newest durable one."""
    memory: MemorySnapshot | None = None
    """Newest snapshot in memory."""
    interval: CheckpointInterval | None = None
    """How often durable ones are made."""


class Restarts(StatusModel):
    """Restarts by rung, over the life of the job."""

    in_process: int = 0
    """Generations started again with all worker processes kept."""
    process: int = 0
    """Worker processes started again in their pod."""
    container: int = 0
    """Containers started again in place by the kubelet."""
    spare: int = 0
    """Slots taken by a spare."""
    pod: int = 0
    """Pods replaced."""
    shrink: int = 0
    """Times that training went on with fewer nodes."""
    requeue: int = 0
    """Times that all pods were let go for want of room."""
    total: int = 0
    """All of them."""


class BudgetsUsed(StatusModel):
    """Uses of each budget since the last durable checkpoint beyond a fault."""

    in_process: int = 0
    process: int = 0
    pod: int = 0
    requeue: int = 0


class ElasticStatus(StatusModel):
    """On how many nodes the job trains, and what it waits for to change that."""

    nodes: int = 0
    """Nodes that the current epoch trains on; 0 before the first one."""
    short_since: str | None = None
    """Since when a slot waits for a pod, RFC 3339."""
    room_since: str | None = None
    """Since when more nodes than now could train, RFC 3339."""
    requeued_at: str | None = None
    """When all pods were last let go for want of room, RFC 3339."""


class Fault(StatusModel):
    """One fault and what it cost."""

    at: str
    """When it was noticed, RFC 3339."""
    epoch: int = 0
    """Epoch in which it happened."""
    generation: int = 0
    """Generation that it ended."""
    cause: str
    """WorkerExited, AgentLost, PodLost, NodeLost, PreflightFailed, Straggler, Corruption, Hang, StoreLost …"""
    rung: str
    """inProcess, process, container, spare, pod, shrink or requeue."""
    node: str | None = None
    """Kubernetes node."""
    pod: str | None = None
    """Pod."""
    rank: int | None = None
    """Global rank of the worker that failed first."""
    exit_code: int | None = None
    """Exit code, or minus the signal."""
    witness: str = ""
    """Who noticed: exit, stream, heartbeat, podStatus, nodeCondition, devicePlugin, taint, preflight, progress,
    ownWork (the leader, by how long each rank computes), arbiter (ranks, by comparing what they compute)."""
    blame: str = ""
    """Named: a rule or a verdict says that the node is to blame; Suspected: the worker's error may be its GPU's."""
    message: str = ""
    """What is known of it: a worker's error, or where a stuck one stands."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds per part of the recovery: detect, decide, restart, restore, recompute. Of several faults that were mended
    together the newest has all but detect."""
    steps_lost: int | None = None
    """Steps that had to be computed again; absent until that is known. Of several faults that were mended together the
    newest has them, the others 0."""
    restored_from: str = ""
    """Where the state was that training went on from: memory, buddy (the memory of another pod) or store."""
    log_tail: list[str] = Field(default_factory=list)
    """Last lines of the worker's output."""


class Verdict(StatusModel):
    """Ranks that make the others wait, or compute wrong numbers, and why; and figures that may come of such numbers."""

    kind: str = "Slow"
    """Slow, Corrupt, or Outlier."""
    cause: str
    """Of a slow one: Clock, Memory, Compute, Host, Network, Data: of these ranks; Pauses, PipelineImbalance,
    LengthImbalance: of the workload, which no node is to blame for, and neither for Host where the container's CPU
    limit holds it up. Of a corrupt one: Permanent, wrong each time that it was looked at; Intermittent; Undecided, of
    these ranks some are wrong, and nobody can say which. Of an outlier, the job's figure that is far above what it
    lately was: loss, gradientNorm, updateSize."""
    ranks: list[int] = Field(default_factory=list)
    """Global ranks; none where all are alike."""
    nodes: list[str] = Field(default_factory=list)
    """Kubernetes nodes of these ranks; none where no node is to blame."""
    devices: list[str] = Field(default_factory=list)
    """GPUs of corrupt ranks, by serial number and UUID, where the preflight checks have read them."""
    since: int = 0
    """Step at which it began, as far as can be told; of a corrupt one, at which it was first found."""
    slowdown: float = 0
    """How much longer what is slow takes than it should: 0.3 is 30 %."""
    cost: float = 0
    """Share of the job's step time that it loses, 0 to 1."""
    confidence: float | None = None
    """Share of a corrupt rank's computations that were wrong when it was last looked at; 0 where undecided."""
    seen: int | None = None
    """Steps on which a corrupt one was found."""
    evidence: str = ""
    """The numbers, and the remedy where the workload is to be changed."""
    at: str
    """When it was found, RFC 3339."""
    ended: str | None = None
    """When it was seen to be over, or was put aside, RFC 3339."""


class Injection(StatusModel):
    """A fault that somebody has made on purpose, by `lockstep inject`."""

    id: str
    """Tells it from others."""
    rank: int
    """Global rank."""
    node: str = ""
    """Kubernetes node of that rank."""
    what: str
    """What was done."""
    at: str
    """When, RFC 3339."""


class ExcludedNode(StatusModel):
    """A node that this job's new pods stay away from."""

    node: str
    """Kubernetes node."""
    since: str
    """When the fault was noticed that named it, RFC 3339."""
    until: str
    """RFC 3339."""
    reason: str = ""
    """Cause of that fault."""


class LedgerState(StatusModel):
    """What the operator must remember to go on with the ledger; the ledger itself is in status.ledger."""

    at: float = 0
    """Unix seconds up to which pods' time is accounted for; 0: nothing yet."""
    base: dict[str, float] = Field(default_factory=dict)
    """GPU-seconds by class: closed epochs, and time outside membership."""
    member_seconds: float = 0
    """GPU-seconds that this epoch's members held."""
    leader: dict[str, float] = Field(default_factory=dict)
    """This epoch's newest totals from the leader, GPU-seconds by class."""


class TrainingJobStatus(StatusModel):
    """What is."""

    observed_generation: int | None = None
    """metadata.generation that this status speaks of."""
    phase: Phase | None = None
    """One word."""
    conditions: list[Condition] = Field(
        default_factory=list,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    """metav1 conditions: Ready, Shrunk, Suspended, CheckpointDegraded, SlowNode, MixedImages, Succeeded, Failed."""
    epoch: int = 0
    """Number of the current membership; raised at each change."""
    slot_map_hash: str | None = None
    """Hash of the current membership: which pod holds which slot."""
    slots: dict[str, str] = Field(default_factory=dict)
    """Slot → name of the pod that holds it in this epoch."""
    ready: str | None = None
    """Members ready, as ready/nodes, for kubectl."""
    step: str | None = None
    """Step, as step/steps, for kubectl."""
    loss: str | None = None
    """Training loss of the last step, in nats per token, for kubectl."""
    members: Members = Field(default_factory=Members)
    """Pods by role."""
    elastic: ElasticStatus = Field(default_factory=ElasticStatus)
    """On how many nodes it trains."""
    progress: Progress = Field(default_factory=Progress)
    """Progress."""
    checkpoint: CheckpointStatus = Field(default_factory=CheckpointStatus)
    """Checkpoints."""
    goodput: float | None = None
    """Share of GPU time that was productive, queued and suspended time left out."""
    goodput_percent: str | None = None
    """The same for kubectl."""
    ledger: dict[str, float] = Field(default_factory=dict)
    """GPU-seconds by class."""
    ledger_state: LedgerState = Field(default_factory=LedgerState)
    """For the operator's own use."""
    restarts: Restarts = Field(default_factory=Restarts)
    """Restarts by rung."""
    budgets_used: BudgetsUsed = Field(default_factory=BudgetsUsed)
    """Budget in use."""
    incarnations: dict[str, int] = Field(default_factory=dict)
    """Ordinal → incarnation of its newest pod, where that is not 0: names are never used twice."""
    faults: list[Fault] = Field(default_factory=list)
    """The last ten; of pods lost in the minute before the newest all, 64 more at most."""
    verdicts: list[Verdict] = Field(default_factory=list)
    """Slow and corrupt ranks, and unusual figures: the last 10 findings, those that are over among them."""
    injections: list[Injection] = Field(default_factory=list)
    """Faults made on purpose, by `lockstep inject`: the last ten."""
    excluded_nodes: list[ExcludedNode] = Field(default_factory=list)
    """Nodes that new pods stay away from because of this job's own faults."""
    checked_nodes: list[str] = Field(default_factory=list)
    """Nodes that passed this job's full preflight checks and were not suspected since: a further pod there makes the
    quick ones."""
    fault_cursor: str = "0/0"
    """epoch/generation of the newest fault that was counted: none is counted twice."""
    start_time: str | None = None
    """When the operator first acted on the job, RFC 3339."""
    completion_time: str | None = None
    """When it ended, RFC 3339."""
    active_since: str | None = None
    """Start of the current stretch outside suspension, RFC 3339."""
    active_seconds: float = 0
    """Active time of earlier stretches."""
