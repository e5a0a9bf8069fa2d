"""What of a job's spec matters to the protocol."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_trainer.protocol.policy import Ladder
from lockstep_trainer.protocol.progress import HangBounds
from lockstep_trainer.protocol.slow import SlowRules


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What of the job's spec matters to its leader."""

    job_uid: str
    nodes: int  # in all; a leader's own plan has those of its epoch
    gpus_per_node: int
    steps: int | None = None  # in all; None for a user's script
    reports_steps: bool = True  # false for a user's script
    checkpoints: bool = True
    checkpoint_every: int | None = None  # steps between durable states; None: by measured cost and rate of faults
    memory_buddy: bool = True  # snapshots are copied to another agent
    own_store: bool = False  # workers bring their own store and need a fresh port each generation
    rejoin_grace: float = 5.0
    ladder: Ladder = Ladder()  # noqa: RUF009  (frozen)
    hang: HangBounds = HangBounds()  # noqa: RUF009  (frozen)
    spares: int = 0  # pods beyond ``nodes`` that the job keeps ready
    rollback: bool = False  # a rank that computes wrong numbers is put aside, and what it may have spoiled left
    slow: SlowRules | None = None  # None: slow ranks are not looked for
