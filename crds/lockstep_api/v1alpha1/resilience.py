"""What is done when something breaks."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from lockstep_api.v1alpha1.base import Model


class BudgetsSpec(Model):
    """How often each rung of the recovery ladder may be used before a fault goes a rung up, and at last fails the
    job. A budget is full again once a checkpoint newer than the fault is durable."""

    process: int = Field(default=10, ge=0)
    """Restarts of worker processes."""
    pod: int = Field(default=5, ge=0)
    """Replacements of pods."""


class HangSpec(Model):
    """When missing progress counts as a hang."""

    factor: float = Field(default=5.0, ge=1.5)
    """Times the median step."""
    minimum_seconds: float = Field(default=60, ge=1)
    """Never sooner than this."""
    first_step_seconds: float = Field(default=1800, ge=1)
    """Bound for the time from start to the first step: compilation, restore, data."""


class RetryAction(StrEnum):
    """What an exit code means."""

    RESTART = "Restart"
    """Take the ladder, as for any fault."""
    FAIL = "Fail"
    """The user's error: the job fails at once."""


class RetryRule(Model):
    """What is done when a worker exits with one of these codes; the first rule that matches counts."""

    exit_codes: list[Annotated[int, Field(ge=1, le=255)]] = Field(min_length=1, max_length=64)
    """Exit codes."""
    action: RetryAction
    """Action."""


class ResilienceSpec(Model):
    """What is done when something breaks."""

    budgets: BudgetsSpec = Field(default_factory=BudgetsSpec)
    """Budgets per rung."""
    retry: list[RetryRule] = Field(default_factory=list, max_length=32)
    """Rules on exit codes."""
    hang: HangSpec = Field(default_factory=HangSpec)
    """Hang detection."""
    rejoin_grace_seconds: float = Field(default=5, ge=0.1, le=3600)
    """How long a member without a stream may take to come back once steps have stopped."""
    leader_deadline_seconds: float = Field(default=60, ge=1, le=3600)
    """How long the leader may be silent when only one witness says so; with two it is 5 s."""
