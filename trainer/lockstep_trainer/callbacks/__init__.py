"""Callbacks: who is told how training goes."""

from __future__ import annotations

from lockstep_trainer.callbacks.base import Callback, Checkpoint, Evaluation, Outcome, Run, Step
from lockstep_trainer.callbacks.runner import Callbacks

__all__ = ["Callback", "Callbacks", "Checkpoint", "Evaluation", "Outcome", "Run", "Step"]
