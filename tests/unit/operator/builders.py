"""A small world to plan in: pods, agents and a leader that do what a plan asks for, and whatever a test wants.

Time is a number that tests move. Nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lockstep_api.messages import (
    FaultReport,
    Finished,
    Inventory,
    Membership,
    Progress,
    ReplaceRequest,
    RestorePoint,
    StateId,
    StepSummary,
    Term,
)
from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_operator.plan import plan
from lockstep_operator.plan.actions import Event, Plan
from lockstep_operator.plan.observed import Agent, Leader, Node, Observed, Pod, Refusal

UID = "6f0c-uid"
CREDENTIALS = Credentials(MasterKeys(b"a master key for tests"))
START = 1_700_000_000.0


def make_job(nodes: int = 2, spares: int = 0, status: TrainingJobStatus | None = None, **spec: Any) -> TrainingJob:
    """A command job, so that manifests stay short; ``spec`` are further fields in camelCase."""
    return TrainingJob.model_validate(
        {
            "metadata": {"name": "run", "namespace": "team", "uid": UID, "generation": 1},
            "spec": {"nodes": nodes, "gpusPerNode": 2, "spares": spares, "command": ["train"], **spec},
            "status": (status or TrainingJobStatus()).to_wire(),
        }
    )


def inventory(pod: Pod, epoch: int = 0, **fields: Any) -> Inventory:
    """What that pod's agent says of itself."""
    defaults: dict[str, Any] = {
        "job_uid": UID,
        "pod": pod.name,
        "pod_uid": pod.uid,
        "boot_id": f"boot-{pod.uid}",
        "term": Term(epoch, 0),
        "leading": None,
        "slot": None,
        "running": None,
        "step": 0,
        "leader_silent": None,
        "container_starts": 1,
        "agent_starts": 1,
    }
    return Inventory(**{**defaults, **fields})


def summary(step: int, at: float, seconds: float = 1.0) -> StepSummary:
    """A step that ended at ``at``."""
    return StepSummary(step=step, at=at, seconds=seconds, loss=2.0, tokens=1000, grad_norm=1.0, lr=1e-3)


def progress(epoch: int, **fields: Any) -> Progress:
    """What the leader of that epoch says."""
    defaults: dict[str, Any] = {
        "job_uid": UID,
        "term": Term(epoch, 1),
        "sequence": 1,
        "state": "running",
        "connected": 2,
        "steps": 100,
        "newest": None,
        "tokens_per_second": None,
        "tokens": 0,
        "eval_loss": None,
        "durable": None,
        "durable_at": None,
        "durable_uri": None,
        "checkpoint_problem": None,
        "ledger": {},
    }
    return Progress(**{**defaults, **fields})


def durable(step: int, at: float, epoch: int = 1) -> dict[str, Any]:
    """The fields of a Progress that name a durable checkpoint."""
    point = RestorePoint(StateId(step, epoch, 1), f"step-{step}/manifest.json", "00")
    return {"durable": point, "durable_at": at, "durable_uri": f"file:///ck/step-{step}/manifest.json"}


def fault(epoch: int, generation: int, **fields: Any) -> FaultReport:
    """A worker that died, unless said otherwise."""
    defaults: dict[str, Any] = {
        "job_uid": UID,
        "term": Term(epoch, generation),
        "at": START,
        "cause": "WorkerExited",
        "rung": "process",
        "witness": "exit",
        "slot": 1,
        "rank": 3,
        "exit_code": -9,
    }
    return FaultReport(**{**defaults, **fields})


def finished(epoch: int, outcome: str = "succeeded", reason: str = "Completed") -> Finished:
    """The leader's last word."""
    return Finished(UID, Term(epoch, 1), outcome, reason, "The last step is durable.")  # type: ignore[arg-type]


def replace_request(epoch: int, *slots: int, cause: str = "MemberLost") -> ReplaceRequest:
    """The leader gives members up."""
    return ReplaceRequest(UID, epoch, slots, cause, "stream")


@dataclass
class World:
    """One job and what is around it. ``settle`` plans until a plan changes nothing, as a controller does."""

    job: TrainingJob
    now: float = START
    pods: dict[str, Pod] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)
    leader: Leader | None = None
    fenced: Membership | None = None
    refusal: Refusal | None = None
    excluded: frozenset[str] = frozenset()
    children: set[str] = field(default_factory=set)
    created: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    forced: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    sent: list[Any] = field(default_factory=list)
    job_deleted: bool = False
    room: bool = True  # new pods find a node
    tls: bool = True  # what the operator is set to
    auto: bool = True  # pods run, agents answer and the leader leads as soon as they are asked for

    @property
    def status(self) -> TrainingJobStatus:
        return self.job.status

    def observed(self) -> Observed:
        return Observed(
            pods=tuple(self.pods.values()),
            nodes=dict(self.nodes),
            children=frozenset(self.children),
            agents=dict(self.agents),
            leader=self.leader,
            fenced=self.fenced,
            refusal=self.refusal,
            excluded=self.excluded,
            tls=self.tls,
        )

    def plan(self) -> Plan:
        return plan(self.job, self.observed(), self.now)

    def step(self) -> Plan:
        """One plan, and its effects."""
        decided = self.plan()
        self.job = self.job.model_copy(update={"status": decided.status})
        if decided.fence:
            self.fenced = decided.fence
        self.children |= set(decided.children)
        self.events += decided.events
        for new in decided.create:
            assert new.name not in self.pods, f"{new.name} exists already"
            self.created.append(new.name)
            self.add_pod(new.name, new.ordinal, new.incarnation, new.exclude_nodes, tls=new.tls)
        for gone in decided.delete:
            self.deleted.append(gone.name)
            pod = self.pods[gone.name]
            if gone.force:
                self.forced.append(gone.name)
            if self._node(pod).ready or gone.force:
                del self.pods[gone.name]
            else:
                self.pods[gone.name] = replace(pod, deleting=True, deleted_at=self.now)
        for label in decided.label:
            if label.name in self.pods:
                self.pods[label.name] = replace(
                    self.pods[label.name], slot=label.slot, epoch=label.epoch, role=label.role
                )
        self.job_deleted = self.job_deleted or decided.delete_job
        self._links(decided)
        return decided

    def settle(self, limit: int = 20) -> Plan:
        for _ in range(limit):
            before = (self.job, self.observed())
            decided = self.step()
            if (self.job, self.observed()) == before:
                return decided
        raise AssertionError(f"no fixpoint after {limit} plans: {decided}")

    def add_pod(
        self, name: str, ordinal: int, incarnation: int, exclude: tuple[str, ...] = (), *, tls: bool = True
    ) -> Pod:
        node = self.schedule(ordinal, exclude)
        pod = Pod(name, f"uid-{name}", ordinal, incarnation, "Pending", self.now, tls=tls)
        if self.auto and self.room:
            pod = replace(pod, phase="Running", running=True, node=node, address=f"10.0.0.{ordinal}:29400")
        self.pods[name] = pod
        return pod

    def schedule(self, ordinal: int, exclude: tuple[str, ...] = ()) -> str:
        """A node for the pod; those that are down, or not to be used, are passed over."""
        node = f"node-{ordinal}"
        while not self.usable(self.nodes.setdefault(node, Node(node))) or node in exclude:
            node += "x"
        return node

    def usable(self, node: Node) -> bool:
        return not (node.down or node.cordoned or node.leaving)

    def run_pods(self) -> None:
        """Every pending pod is scheduled and starts."""
        for name, pod in self.pods.items():
            if pod.phase == "Pending":
                self.pods[name] = replace(
                    pod,
                    phase="Running",
                    running=True,
                    node=self.schedule(pod.ordinal),
                    address=f"10.0.0.{pod.ordinal}:29400",
                )

    def answers(self, name: str, *, warm: bool = True) -> None:
        """A pod's agent says who it is, and whether its workers' imports are loaded."""
        self.agents[self.pods[name].uid] = Agent(inventory(self.pods[name], warm=warm), self.now)

    def make_room(self) -> None:
        """Pods that waited for a node get one."""
        self.room = True
        self.run_pods()

    def say(self, **fields: Any) -> None:
        """The leader reports; fields of Progress."""
        assert self.leader is not None
        fresh = progress(self.status.epoch, **fields)
        self.leader = replace(self.leader, progress=fresh, advanced=self.now if fresh.newest else self.leader.advanced)

    def train(self, step: int = 1) -> None:
        """From nothing to a running job at that step."""
        self.settle()
        self.say(newest=summary(step, self.now))
        self.settle()

    def pod_of(self, slot: int) -> Pod:
        return self.pods[self.status.slots[str(slot)]]

    def take_down(self, node: str) -> None:
        self.nodes[node] = Node(node, ready=False)

    def new_operator(self) -> None:
        """The operator dies; another one starts and knows nothing but what the API and the agents tell it."""
        self.fenced, self.children, self.agents = None, set(), {}
        if self.leader:
            self.leader = replace(
                self.leader, faults=(), recovered=(), replace=None, epoch_request=None, progress=None, advanced=None
            )

    def _node(self, pod: Pod) -> Node:
        return self.nodes.get(pod.node, Node(pod.node))

    def _links(self, decided: Plan) -> None:
        there = {pod.uid for pod in self.pods.values()}
        self.agents = {uid: agent for uid, agent in self.agents.items() if uid in there}
        self.sent += decided.send
        if not self.auto:
            return
        for target in decided.probe:
            pod = self.pods.get(target.pod)
            if pod and self._node(pod).ready:
                known = self.agents.get(pod.uid)
                said = known.inventory if known and known.inventory else inventory(pod)
                self.agents[pod.uid] = Agent(said, self.now)
        if decided.leader is None:
            self.leader = None
        elif self.leader is None or self.leader.pod_uid != decided.leader.uid:
            pod = self.pods.get(decided.leader.pod)
            if pod:
                self.leader = Leader(pod.uid, True, self.now, inventory=inventory(pod))
        for message in decided.send:
            if isinstance(message, Membership) and self.leader and self.leader.inventory:
                said = replace(self.leader.inventory, leading=message.epoch, term=Term(message.epoch, 0))
                self.leader = Leader(self.leader.pod_uid, True, self.now, inventory=said)


def running(nodes: int = 3, spares: int = 0, **spec: Any) -> World:
    """A job that has trained for ten steps."""
    world = World(make_job(nodes=nodes, spares=spares, **spec))
    world.train(step=10)
    return world
