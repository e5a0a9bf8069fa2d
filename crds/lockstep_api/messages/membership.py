"""Who is a member and whom it follows: between operator, leader and members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep_api.messages.parts import Copies, Cut, Descent, Origin, SlotInfo, Term


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
    warm: bool = True  # workers would start at once; False while their imports still load
    devices: tuple[str, ...] = ()  # its GPUs in order, each by serial number and UUID; empty where nobody knows them
    protocol: int = 1
    kind: Literal["Inventory"] = "Inventory"


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
    descent: Descent | None = None
    kind: Literal["Join"] = "Join"


@dataclass(frozen=True, slots=True)
class Beat:
    """Either way, when there was nothing else to say for a while."""

    job_uid: str
    term: Term
    slot: int
    kind: Literal["Beat"] = "Beat"


@dataclass(frozen=True, slots=True)
class Leaving:
    """Member → leader: this pod was told to end (drain, preemption, deletion) and will be gone after ``seconds``."""

    job_uid: str
    term: Term
    slot: int
    seconds: float
    kind: Literal["Leaving"] = "Leaving"


@dataclass(frozen=True, slots=True)
class Release:
    """Leader → member: the job is over or you are no member; end your workers and wait to be deleted."""

    job_uid: str
    term: Term
    reason: str
    kind: Literal["Release"] = "Release"
