"""What is remembered of a node. All times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BY_SCORE = "score"
BY_ADMINISTRATOR = "administrator"


@dataclass(frozen=True, slots=True)
class NodeFault:
    """A fault that speaks against a node."""

    at: float
    job: str  # uid
    pod: str
    cause: str
    weight: float  # what it adds to the score when it is new
    hard: bool  # the node itself was the witness, or a verdict names it; soft: it is one explanation among others

    @property
    def key(self) -> tuple[str, str, float]:
        """What names it: a job tells of the same fault again and again, and may learn more about it."""
        return self.job, self.pod, self.at


@dataclass(frozen=True, slots=True)
class Exclusion:
    """New pods stay away from the node."""

    since: float
    by: str
    reason: str
    until: float | None = None  # an administrator's; without one it ends when the score has decayed, or never


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node's faults, oldest first, and whether it is excluded."""

    faults: tuple[NodeFault, ...] = ()
    exclusion: Exclusion | None = None
    forgiven: float | None = None  # faults up to then were forgiven by an administrator: jobs tell of them again


Records = Mapping[str, NodeRecord]
"""By name of the node. A node that is made again under its name is the same machine more often than not."""
