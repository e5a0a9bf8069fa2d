"""Where the workers of a generation stand that makes no step any more: between leader and members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep_api.messages.parts import Term


@dataclass(frozen=True, slots=True)
class GroupCalls:
    """A rank's collectives in one of its process groups. All ranks of the group count alike."""

    group: str  # what it is for, and a digest of its ranks
    entered: int  # collectives begun
    done: int  # of which ended
    op: str = ""  # the newest: all_reduce, all_gather, …


@dataclass(frozen=True, slots=True)
class Position:
    """Where one worker is."""

    rank: int
    step: int  # the last that it finished
    section: str  # of its step records: load, forward, …
    process: str = ""  # state in /proc: R running, S sleeping, D uninterruptible, T stopped; "": it is gone
    answered: bool = False  # False: its interpreter did not get to say what follows
    frames: tuple[str, ...] = ()  # of its main thread, innermost first: "file.py:120 function"
    communicating: bool = False  # the innermost frame is torch's communication
    groups: tuple[GroupCalls, ...] = ()


@dataclass(frozen=True, slots=True)
class Examine:
    """Leader → member: no step is made any more; where are your workers of this generation?"""

    job_uid: str
    term: Term
    kind: Literal["Examine"] = "Examine"


@dataclass(frozen=True, slots=True)
class Examined:
    """Member → leader: there."""

    job_uid: str
    term: Term
    slot: int
    positions: tuple[Position, ...]
    kind: Literal["Examined"] = "Examined"
