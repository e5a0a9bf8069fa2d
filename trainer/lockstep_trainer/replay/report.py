"""Ring replay as a job asks for it, and what of it goes into the run's journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lockstep_api.v1alpha1 import CorruptionAction
from lockstep_trainer.batch import Batch
from lockstep_trainer.config import Job
from lockstep_trainer.inject import Injector
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.replay.ring import Disagreement, Ring
from lockstep_trainer.replay.sampling import Sampling


class Replay:
    """What the training loop calls in place of the engine. Without ``resilience.corruption`` it is the engine."""

    def __init__(self, engine: Engine, ring: Ring | None, say: Callable[..., None] = lambda *_, **__: None) -> None:
        self._engine, self._ring, self._say = engine, ring, say

    @classmethod
    def of(
        cls,
        job: Job,
        engine: Engine,
        control: dist.ProcessGroup | None,
        injector: Injector | None,
        say: Callable[..., None],
    ) -> Replay:
        """As the job asks for it; all ranks call it. ``say`` writes a line into the journal, on one rank: its kind, and
        its fields."""
        spec, recipe = job.spec.resilience.corruption, job.trainer.recipe
        if spec.action is CorruptionAction.OFF:
            return cls(engine, None)
        ring = Ring(
            engine,
            control,
            sampling=Sampling(recipe.seed, spec.sample),
            compiled=recipe.compile,
            report=lambda found: say("corruption", **journal_line(found)),
        )
        if injector is not None:
            injector.replaying = lambda: ring.replaying
        return cls(engine, ring, say)

    def includes(self, step: int) -> bool:
        """Whether ``step`` is going to be compared: then more is computed than its batch."""
        return self._ring is not None and self._ring.includes(step)

    def suspect(self, step: int) -> None:
        """Something else speaks for wrong numbers at ``step``: more steps are compared for a while. All ranks call
        it."""
        if self._ring is not None:
            self._ring.sampling = replace(self._ring.sampling, suspected_at=step)

    def forward_backward(self, step: int, batch: Batch, denominator: Tensor | int) -> Tensor:
        """As the engine's, for the training step ``step``."""
        if self._ring is None or not self.includes(step):
            return self._engine.forward_backward(batch, denominator)
        sums = self._ring.forward_backward(step, batch, denominator)
        if self._ring.agreed == step:
            self._say("replayed", step=step)
        return sums

    def agreed(self, step: int) -> bool:
        """Whether ``step`` was replayed, and all ranks agreed at once."""
        return self._ring is not None and self._ring.agreed == step


def journal_line(found: Disagreement) -> dict[str, Any]:
    """The fields of a journal line of the kind «corruption»."""
    return {
        "step": found.step,
        "run": found.run,
        "rejected": found.rejected,
        "calibration": found.calibration,
        "verdicts": [
            {
                "kind": verdict.kind,
                "unit": verdict.unit,
                "ranks": list(verdict.ranks),
                "point": str(verdict.point),
                "confidence": round(verdict.confidence, 3),
                "evidence": verdict.evidence,
            }
            for verdict in found.verdicts
        ],
    }
