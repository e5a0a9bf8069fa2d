"""What a plan may ask for. The shell writes the status first, then does the rest in any order: all of it follows from
the status and from what exists, so a shell that dies in between is followed by one that comes to the same plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep_api.messages import FromOperator, Membership
from lockstep_api.v1alpha1 import TrainingJobStatus

ChildKind = Literal["Service", "Secret", "ConfigMap"]


@dataclass(frozen=True, slots=True)
class NewPod:
    """A pod to create. Its name follows from the job, ordinal and incarnation; that it exists already is fine."""

    name: str
    ordinal: int
    incarnation: int
    avoid_nodes: tuple[str, ...] = ()  # lately lost, perhaps not yet known to the scheduler: a preference
    exclude_nodes: tuple[str, ...] = ()  # never there
    checked_nodes: tuple[str, ...] = ()  # there full preflight checks need not be repeated
    tls: bool = True  # its agent speaks TLS, as those of all the job's pods or of none
    image: str = ""  # of the job's other pods, where the template names none; empty: there are no others


@dataclass(frozen=True, slots=True)
class DeletePod:
    """A pod to delete, if it is still this one."""

    name: str
    uid: str
    force: bool = False  # its node is down: nobody is there to confirm the end
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LabelPod:
    """Labels that tell people and selectors what a pod does. Nothing is decided by them."""

    name: str
    uid: str
    role: str
    slot: int | None
    epoch: int | None


@dataclass(frozen=True, slots=True)
class Target:
    """An agent to talk to."""

    pod: str
    uid: str
    address: str  # host:port
    restarts: int = 0  # of its container: an answer from before a restart is old
    tls: bool = True


@dataclass(frozen=True, slots=True)
class Event:
    """A Kubernetes event on the job."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done now."""

    status: TrainingJobStatus
    children: tuple[ChildKind, ...] = ()
    create: tuple[NewPod, ...] = ()
    delete: tuple[DeletePod, ...] = ()
    label: tuple[LabelPod, ...] = ()
    leader: Target | None = None  # keep a stream to it
    fence: Membership | None = None  # remember it once the status is written
    send: tuple[FromOperator, ...] = ()  # on the leader's stream
    probe: tuple[Target, ...] = ()  # ask for their inventories
    events: tuple[Event, ...] = ()
    delete_job: bool = False
    again_at: float | None = None  # plan again then, even if nothing changes
