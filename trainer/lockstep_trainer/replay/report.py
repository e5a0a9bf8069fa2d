"""Ring replay as a job asks for it, and what of it goes into the run's journal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_api.v1alpha1 import CorruptionAction
from lockstep_trainer.agreement import from_all
from lockstep_trainer.batch import Batch
from lockstep_trainer.config import Job
from lockstep_trainer.inject import Injector
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.replay.rest import Named, Resting, by_software, judge_memory
from lockstep_trainer.replay.ring import Disagreement, Ring
from lockstep_trainer.replay.sampling import Sampling

log = logging.getLogger(__name__)


class Replay:
    """What the training loop calls in place of the engine. Without ``resilience.corruption`` it is the engine."""

    def __init__(
        self,
        engine: Engine,
        ring: Ring | None,
        say: Callable[..., None] = lambda *_, **__: None,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self._engine, self._ring, self._say, self._control = engine, ring, say, control
        self._resting: Resting | None = None
        self._looks_at_memory = True

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
        return cls(engine, ring, say, control)

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
        kept = self._memory_kept(self._ring, step)
        if self._ring.agreed == step:
            if kept:
                self._say("replayed", step=step)
            else:
                self._ring.agreed = None
        return sums

    def updated(self, step: int, parameters: Named, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step ``step`` was made; where the next step is compared, so is what it has left. All ranks
        call it."""
        if self._looks_at_memory and self.includes(step + 1):
            self._resting = Resting(parameters, optimizer)

    def _memory_kept(self, ring: Ring, step: int) -> bool:
        """Before the update of ``step``: whether all ranks' memory is as the update before has left it."""
        resting, self._resting = self._resting, None
        if resting is None:
            return True
        changed = from_all(resting.changed(), self._control)
        if by_software(changed):
            log.warning(
                "parameters or moments were changed on purpose between the updates of steps %d and %d (%s): this "
                "generation does not look at memory any more", step - 1, step, next(filter(None, changed))[0],
            )  # fmt: skip
            self._looks_at_memory = False
            return True
        verdicts = judge_memory(ring.units, changed, step - 1)
        if verdicts:
            # The state behind the step before may have been copied since.
            found = Disagreement(step - 1, 1, verdicts, calibration=False, rejected=False)
            for verdict in verdicts:
                log.warning("step %d: %s", step, verdict.evidence)
            self._say("corruption", **journal_line(found))
            self.suspect(step)
        return not verdicts

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
