"""Faults made on purpose: from a member to its leader, so that nobody takes them for real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep_api.messages.parts import Injection, Term


@dataclass(frozen=True, slots=True)
class Injected:
    """Member → leader: these were ordered here, all that this agent remembers. Said before the first is carried out,
    and again on each new stream; the leader knows them apart by their ids."""

    job_uid: str
    term: Term
    slot: int
    injections: tuple[Injection, ...]
    kind: Literal["Injected"] = "Injected"
