"""What a plan is made from: the cluster and the agents, trimmed to what decisions need.

All times are Unix seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lockstep_api.messages import (
    EpochRequest,
    FaultReport,
    Finished,
    Inventory,
    Membership,
    Progress,
    Recovered,
    ReplaceRequest,
)


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod of the job."""

    name: str
    uid: str
    ordinal: int
    incarnation: int
    phase: str  # Pending, Running, Succeeded, Failed, Unknown
    created: float
    node: str = ""  # empty until it is scheduled
    address: str = ""  # host:port of the agent; empty until the pod has an address
    deleting: bool = False
    deleted_at: float | None = None  # when its deletion was asked for
    disruption: str = ""  # why the cluster took it away: PreemptionByScheduler, EvictionByEvictionAPI …
    refused: str = ""  # its kubelet did not admit it, so that nothing of it ever ran: why
    unfit: str = ""  # its container ended since the node failed the preflight checks: what they found
    bad_device: str = ""  # the kubelet says that a device of the container is unhealthy: its name
    restarts: int = 0  # of the container `trainer`, in place
    running: bool = False  # that container runs now
    waiting: str = ""  # why it does not: ImagePullBackOff, CrashLoopBackOff, CreateContainerConfigError …
    message: str = ""  # a sentence of the cluster's: why it failed, waits or can't be scheduled
    slot: int | None = None  # labels, as they are on the pod
    epoch: int | None = None
    role: str = ""
    tls: bool = True  # its agent speaks TLS
    image: str = ""  # that the container was made with, as its template names it
    image_id: str = ""  # that it runs: where a tag led to on its node

    @property
    def ended(self) -> bool:
        """Nothing runs in it any more, and nothing will."""
        return self.phase in ("Failed", "Succeeded")


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the cluster."""

    name: str
    ready: bool = True
    out_of_service: bool = False  # an administrator or the cloud says: it is off, its pods are dead
    cordoned: bool = False  # no new pods; planned work
    leaving: str = ""  # it is about to be taken away: the notice, a few words
    sick: str = ""  # another system has found its hardware at fault: the condition
    gpus: int = 0  # that it has
    gpus_healthy: int = 0  # that the device plugin offers
    taint: str | None = None  # value of our own taint, if it is on the node
    marked: str = ""  # status of our own condition, if the node has it

    @property
    def down(self) -> bool:
        """Nothing that it says can be expected, nothing that runs there counts."""
        return not self.ready or self.out_of_service


@dataclass(frozen=True, slots=True)
class Agent:
    """What one pod's agent has answered."""

    inventory: Inventory | None = None
    answered: float | None = None  # when it last did


@dataclass(frozen=True, slots=True)
class Leader:
    """The stream to the agent of slot 0."""

    pod_uid: str
    connected: bool
    since: float  # when the stream opened; while it is not open, when it closed or was first tried
    inventory: Inventory | None = None
    progress: Progress | None = None
    advanced: float | None = None  # when a newer step was last heard of
    faults: tuple[FaultReport, ...] = ()  # not yet acknowledged
    recovered: tuple[Recovered, ...] = ()
    replace: ReplaceRequest | None = None
    epoch_request: EpochRequest | None = None
    finished: Finished | None = None

    @property
    def epoch(self) -> int | None:
        """The epoch that it leads, as far as it said."""
        heard = [self.inventory.leading] if self.inventory and self.inventory.leading is not None else []
        if self.progress:
            heard.append(self.progress.term.epoch)
        return max(heard, default=None)


_DENIED = re.compile(r"\bdenied (the )?request\b")
"""What the API server says of a webhook's no, and of a ValidatingAdmissionPolicy's."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The API server's no to a pod or another child."""

    what: str  # "pod quickstart-0-0"
    code: (
        int  # HTTP: 403 quota or policy; 400 or 422 a template that can't work, or a webhook's no; 5xx, 429, 0 trouble
    )
    message: str
    retry_at: float

    @property
    def final(self) -> bool:
        """Whether trying again can't help: the template can't be changed. What admission denies, with whatever code,
        may be allowed later."""
        return self.code in (400, 422) and not _DENIED.search(self.message)

    @property
    def passing(self) -> bool:
        """Whether the server, or a webhook that it asks, only could not answer."""
        return self.code not in (400, 403, 422)

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.what} {'could not be created' if self.passing else 'was refused'}: {self.message}"


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that `plan` may look at besides the job itself."""

    pods: tuple[Pod, ...] = ()
    nodes: Mapping[str, Node] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()  # nodes that all jobs' new pods stay away from
    children: frozenset[str] = frozenset()  # kinds known to exist: Service, Secret, ConfigMap
    creating: frozenset[str] = frozenset()  # pods whose creation was answered, not yet in `pods`
    taken: frozenset[tuple[int, int]] = frozenset()  # (ordinal, incarnation) of pods whose names others have and keep
    agents: Mapping[str, Agent] = field(default_factory=dict)  # by pod uid
    leader: Leader | None = None
    fenced: Membership | None = None  # the membership that this process wrote in status, and may therefore send
    refusal: Refusal | None = None  # the newest one that still stands
    tls: bool = True  # what the operator is set to, for jobs that start
