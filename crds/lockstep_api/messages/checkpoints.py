"""States on their way to memory and to the store: between leader and members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep_api.messages.parts import RestorePoint, StateId, StoredFile, Term


@dataclass(frozen=True, slots=True)
class Staged:
    """Member → leader: every worker of the slot has this state in the pod's memory-backed volume; ``copied``: so has
    the slot's buddy, or there is none. Said again when ``copied`` turns true. A member is at one state at a time, and
    neither it nor its buddy lets go of that before Kept or Void: the leader may count on what it was told. ``gone``: it
    was found damaged, or was overwritten, before the buddy had it, and nothing newer is staged: nobody need wait."""

    job_uid: str
    term: Term
    slot: int
    state: StateId
    copied: bool
    size: int = 0  # bytes of the slot's ranks
    blocked: float = 0.0  # seconds that training stood still for it, the largest over the slot's ranks
    gone: bool = False
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
class TakeSnapshot:
    """Leader → member: ask the workers for a snapshot behind the step that they are in (they agree on it among
    themselves); a suspension or the end of a pod is near."""

    job_uid: str
    term: Term
    hold: bool = False  # they wait behind it until their generation is ended
    kind: Literal["TakeSnapshot"] = "TakeSnapshot"


@dataclass(frozen=True, slots=True)
class Upload:
    """Leader → member: bring this staged state to the store; it descends from ``parent``. A newer order replaces one
    that is not finished."""

    job_uid: str
    term: Term
    state: StateId
    parent: RestorePoint | None
    slots: tuple[int, ...] = ()  # whose ranks' copies to bring; empty: the member's own
    again: bool = False  # what was brought before is not in the store any more
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
    slots: tuple[int, ...] = ()  # of the order that this answers: another one of the same state may want other files
    again: bool = False  # as in that order
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
class Committed:
    """Leader → member: this state is durable."""

    job_uid: str
    term: Term
    restore: RestorePoint
    kind: Literal["Committed"] = "Committed"
