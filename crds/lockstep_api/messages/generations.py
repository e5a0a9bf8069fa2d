"""Generations of workers, from their start to their end: between leader and members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep_api.messages.parts import (
    Copies,
    Cut,
    Doubt,
    MemoryPoint,
    Origin,
    RankWork,
    Rendezvous,
    RestorePoint,
    StepSummary,
    Term,
)


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
    fresh: bool = False  # in new processes, also where workers of the last generation rest
    loose: bool = False  # the store is away: ``restore`` is what the members know, and nothing is committed for now
    doubt: Doubt | None = None
    kind: Literal["Start"] = "Start"


@dataclass(frozen=True, slots=True)
class Abandon:
    """Leader → member: end the workers of this and every older generation, then say Quiesced."""

    job_uid: str
    term: Term
    cause: str
    cut: Cut | None = None  # the newest that the leader knows of
    kind: Literal["Abandon"] = "Abandon"


@dataclass(frozen=True, slots=True)
class Quiesced:
    """Member → leader: no worker of ``term`` or older is left, all are reaped or rest between generations; these
    snapshots are, and the cut that came with Abandon is written down. Said again when they change."""

    job_uid: str
    term: Term
    slot: int
    origin: Origin | None = None
    snapshots: tuple[Copies, ...] = ()
    resting: int = 0  # workers that can go on in the same process
    kind: Literal["Quiesced"] = "Quiesced"


@dataclass(frozen=True, slots=True)
class Steps:
    """Member → leader: steps that all its workers have finished since the last message, and where they are now."""

    job_uid: str
    term: Term
    slot: int
    done: tuple[StepSummary, ...]
    section: str  # of the slowest local worker: load, forward, backward, …
    work: tuple[RankWork, ...] = ()  # of its ranks since the last message, where it is measured
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
    log_tail: tuple[str, ...] = ()  # see tails.searched; where no rule has a pattern, tails.tail
    at: float = 0.0
    kind: Literal["WorkerExited"] = "WorkerExited"
