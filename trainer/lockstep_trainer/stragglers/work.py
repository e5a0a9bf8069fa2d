"""What the search for slow ranks is told, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is in the job. Ranks that differ in ``data`` alone do the same work on other samples."""

    rank: int
    node: str
    data: int = 0
    pipeline: int = 0
    """Its pipeline stage."""
    tensor: int = 0
    context: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """One rank's own work in one optimizer step: waiting for other ranks is left out of all but ``waited``."""

    rank: int
    compute: float
    """Seconds its device computed: forward, backward, optimizer."""
    data: float
    """Seconds it waited for its own batch."""
    host: float
    """Seconds its device had nothing to do as its own host was late: garbage collection, Python, the launch of
    kernels."""
    waited: Mapping[str, float]
    """Dimension of the mesh (``data``, ``pipeline``, ``tensor``, ``context``) → seconds in its collectives: waiting
    for the last rank of the group, and the transfer itself. Whoever comes last waits for nobody: the least over a
    group's ranks is its transfer."""
    tokens: int
    """Tokens it computed."""
    squares: int
    """Σ length² over the documents it computed: what attention's work grows with."""
    clock: float | None = None
    """Mean clock of its device during the step, MHz; None where it is not known."""


class Cause(StrEnum):
    """Why a rank's step is longer than its peers'."""

    CLOCK = "Clock"
    """Its device runs at a lower clock: heat, power."""
    MEMORY = "Memory"
    """Its device's memory is slow; the matrix product is not."""
    COMPUTE = "Compute"
    """Its device computes slowly at its full clock."""
    HOST = "Host"
    """Its host is late in giving work to the device, all the time."""
    NETWORK = "Network"
    """Its link."""
    DATA = "Data"
    """It waits for its batches."""
    PAUSES = "Pauses"
    """Now and then a host stands still, no rank more than the others: garbage collection, for one."""
    PIPELINE = "PipelineImbalance"
    """A stage has more to do than the others, whichever replica computes it."""
    LENGTHS = "LengthImbalance"
    """Its documents are longer: more attention for as many tokens."""

    @property
    def blames_node(self) -> bool:
        """The hardware is to be put aside; else the workload is to be changed, and no node is to blame."""
        return self in _HARDWARE


_HARDWARE = frozenset({Cause.CLOCK, Cause.MEMORY, Cause.COMPUTE, Cause.HOST, Cause.NETWORK})

ProbeKind = Literal["compute", "memory", "link"]


@dataclass(frozen=True, slots=True)
class Probe:
    """Ranks are to be measured at the next step boundary, all at once: a matrix product, a copy within the device's
    memory, or a transfer between the two ranks of each pair."""

    kind: ProbeKind
    ranks: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Probed:
    """Seconds that the probe took, the median of a few repetitions."""

    kind: ProbeKind
    ranks: Mapping[int, float] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict."""

    cause: Cause
    ranks: tuple[int, ...]
    """Whom it names; every rank of the stage for an imbalance of the pipeline, none where all are alike."""
    since: int
    """Step at which it began, as far as can be told."""
    slowdown: float
    """How much longer the part that is slow takes than it should: 0.3 is 30 % longer."""
    cost: float
    """Share of the job's step time that is lost by it, 0 to 1."""
    evidence: str
    """One sentence with the numbers, and the remedy where the workload is to be changed."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What was found is over."""

    finding: Finding
    step: int
