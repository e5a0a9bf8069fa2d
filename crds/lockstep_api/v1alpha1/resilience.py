"""What is done when something breaks."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from lockstep_api.v1alpha1.base import Model, cel

_NO_PATTERN = "resilience.retry: logPattern is no regular expression"
_ONE_OF = "resilience.retry: a rule needs exitCodes, logPattern or both"


class BudgetsSpec(Model):
    """How often each rung of the recovery ladder may be used before a fault goes a rung up, and at last fails the
    job. A budget is full again once a checkpoint newer than the fault is durable."""

    in_process: int = Field(default=20, ge=0)
    """Restarts of a generation in the processes that are there, where no worker has ended."""
    process: int = Field(default=10, ge=0)
    """Restarts of worker processes."""
    pod: int = Field(default=5, ge=0)
    """Replacements of pods; of pods that are lost together, as those of a rack, the first one counts."""
    requeue: int = Field(default=3, ge=0)
    """Times that all pods are let go since there is no room for enough of them."""


class HangSpec(Model):
    """When missing progress counts as a hang."""

    factor: float = Field(default=5.0, ge=1.5)
    """Times the median step."""
    minimum_seconds: float = Field(default=60, ge=1)
    """Never sooner than this."""
    first_step_seconds: float = Field(default=1800, ge=1)
    """Bound for the time from start to the first step: compilation, restore, data."""
    meeting_seconds: float = Field(default=300, ge=1)
    """Bound for the workers of a generation to connect to each other, from when the last of them is there."""


class ElasticSpec(Model):
    """Training on fewer nodes while there is no room for all: at the same global batch and in the same order of
    samples, from the newest checkpoint, and on all of them again when they are there."""

    min_nodes: int = Field(ge=1, le=16_384)
    """Fewest nodes to train on. Whole data-parallel replicas are left out, as many as need be."""
    shrink_after_seconds: float = Field(default=120, ge=1, le=86_400)
    """How long a slot waits for a pod before the job goes on without it. The default is about what it costs to restart
    a large job twice, to shrink and to grow: waiting as long as a change would cost never loses more than twice what
    the best choice would."""


class RetryAction(StrEnum):
    """What a worker's end means."""

    RESTART = "Restart"
    """Take the ladder, as for any fault. Of spec.command: three such ends in a row do not end the job."""
    FAIL = "Fail"
    """The user's error: the job fails at once."""
    EXCLUDE_NODE = "ExcludeNode"
    """The node's error: the slot gets another pod at once, and this job's new pods stay away from that node for
    resilience.nodes.excludeSeconds."""


class RetryRule(Model):
    """What is done when a worker ends like this; the first rule that matches counts."""

    model_config = cel(
        ("has(self.exitCodes) || has(self.logPattern)", _ONE_OF),
        # An expression that does not compile is an error of the evaluation, which names it.
        ("!has(self.logPattern) || ''.matches(self.logPattern) in [true, false]", _NO_PATTERN),
    )

    exit_codes: list[Annotated[int, Field(ge=1, le=255)]] | None = Field(default=None, min_length=1, max_length=64)
    """Exit codes, any of which it must have; left out: any end."""
    log_pattern: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    """Regular expression that one of its last 40 lines of output, or its error, must contain; left out: any text.
    Of a line its first 4,096 characters are looked at, of all lines together the last 64 KiB."""
    action: RetryAction
    """Action."""

    @model_validator(mode="after")
    def _matches_something(self) -> Self:
        if self.exit_codes is None and self.log_pattern is None:
            raise ValueError(_ONE_OF)
        try:
            re.compile(self.log_pattern or "")
        except re.error as error:
            raise ValueError(f"{_NO_PATTERN}: {self.log_pattern!r}: {error}") from None
        return self


class NodesSpec(Model):
    """What is done about nodes. Faults that blame a node are also remembered across jobs: a node with too many of them
    is avoided by all jobs."""

    exclude_per_hour: int = Field(default=4, ge=0, le=1000)
    """At most so many nodes, or 2 % of the job's if more, are excluded by its own faults in any hour; 0: none.
    So many at once point to something that they share, or to the program; then no more are excluded, and an event says
    so."""
    exclude_seconds: float = Field(default=86_400, ge=0)
    """How long this job's new pods stay away from a node that a fault has named: a retry rule with ExcludeNode, an
    unhealthy GPU, a failed preflight check, a verdict."""
    force_delete_after_seconds: float = Field(default=60, ge=0, le=86_400)
    """Pods that were deleted so long ago are deleted by force where their node is not ready: nobody is there to confirm
    their end. Where the node is gone or out of service that is done at once, and elsewhere never."""


class Preflight(StrEnum):
    """How each new pod checks its node before it takes part."""

    OFF = "Off"
    """Not at all."""
    QUICK = "Quick"
    """What the driver and the host tell: memory errors, lost GPUs, links that are down, heat, shared memory, the clock.
    Under a second."""
    FULL = "Full"
    """And, at the job's first use of a node and after a fault that speaks against it, GPUs and the links between them
    under load, a minute: wrong results, slow GPUs, slow links."""


class CorruptionAction(StrEnum):
    """What is done about numbers that hardware got wrong without saying so."""

    OFF = "Off"
    """Nothing is looked for."""
    REPORT = "Report"
    """Some steps are computed twice, on different GPUs. Where these disagree the step is rejected and computed again,
    and who is wrong is told. Training goes on even where they keep disagreeing."""
    ROLLBACK = "Rollback"
    """And who is wrong is put aside: its pod is replaced, its node excluded, and training goes on from the newest state
    that is verified: not beyond the last step on which all agreed. Of two data-parallel ranks a spare (`spares`) tells
    which is wrong. The job fails where they keep disagreeing and nobody can say who is wrong."""


class CorruptionSpec(Model):
    """The search for numbers that hardware got wrong without saying so."""

    action: CorruptionAction = CorruptionAction.OFF
    """Action. All but Off need trainer.recipe.deterministic: only what gives the same bits can be compared."""
    sample: float = Field(default=0.0025, ge=0, le=1)
    """Share of the steps that is compared; more of them while GPUs are suspected. A fault that spoils a share f of the
    micro-batches is found after 1 / (f × sample) steps on average, half of that where f is small."""


class SentinelAction(StrEnum):
    """What is done about figures of the whole job that are far above what they lately were."""

    OFF = "Off"
    """Nothing: they are not looked at."""
    REPORT = "Report"
    """They are told in status, events, metrics and the journal, and more steps are compared between GPUs where
    `corruption` does so; nothing else is done."""


class SentinelsSpec(Model):
    """The watch on loss, gradient norm and the size of AdamW's update."""

    action: SentinelAction = SentinelAction.REPORT
    """Action."""


class StragglerAction(StrEnum):
    """What is done about ranks that are slow."""

    OFF = "Off"
    """Nothing: their work is not measured."""
    REPORT = "Report"
    """They are named, with the cause, in status, events, metrics and the journal; nothing else is done."""
    SWAP = "Swap"
    """And where it is their node's hardware, the node is left: once a pod elsewhere is ready its slot moves behind a
    step whose state is kept, so that no step is lost; new pods stay away from the node."""


class StragglersSpec(Model):
    """The search for slow ranks: for those of which all others wait in each step."""

    action: StragglerAction = StragglerAction.REPORT
    """Action."""
    threshold: float = Field(default=0.1, ge=0.02, le=1)
    """A part of a rank's own work that takes longer by this share counts as slow: 0.1 is 10 %."""
    swaps_per_hour: int = Field(default=2, ge=1, le=10)
    """At most so many nodes are left as slow in any hour; nodes.excludePerHour holds besides. Each costs a restart,
    and a verdict may be wrong."""


class ResilienceSpec(Model):
    """What is done when something breaks."""

    preflight: Preflight = Preflight.QUICK
    """Checks of a new pod's node. Where one fails the pod gets no slot, this job's new pods stay away from the node for
    nodes.excludeSeconds, and another pod is made. That uses up no budget as long as nodes.excludePerHour allows it."""
    budgets: BudgetsSpec = Field(default_factory=BudgetsSpec)
    """Budgets per rung."""
    retry: list[RetryRule] = Field(default_factory=list, max_length=32)
    """Rules on exit codes and last lines of output."""
    hang: HangSpec = Field(default_factory=HangSpec)
    """Hang detection."""
    stragglers: StragglersSpec = Field(default_factory=StragglersSpec)
    """Slow ranks. The work of a user's own command is not measured."""
    nodes: NodesSpec = Field(default_factory=NodesSpec)
    """Nodes."""
    corruption: CorruptionSpec = Field(default_factory=CorruptionSpec)
    """Silent data corruption."""
    sentinels: SentinelsSpec = Field(default_factory=SentinelsSpec)
    """Unusual figures of the whole job."""
    rejoin_grace_seconds: float = Field(default=5, ge=0.1, le=3600)
    """How long a member without a stream may take to come back once steps have stopped."""
    leader_deadline_seconds: float = Field(default=60, ge=1, le=3600)
    """How long the leader may be silent when only one witness says so; with two it is 5 s."""
    elastic: ElasticSpec | None = None
    """Fewer nodes rather than none. Without it the job waits for all of them."""
    requeue_after_seconds: float = Field(default=1800, ge=1, le=604_800)
    """How long a job that has begun waits, holding its pods, for enough nodes to train on. Then it lets its pods go, so
    that others can use their GPUs, and begins again later from its newest checkpoint."""
