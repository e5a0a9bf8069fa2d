"""Ring replay as a job asks for it, and what of it goes into the run's journal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_api.messages import Doubt
from lockstep_api.v1alpha1 import CorruptionAction
from lockstep_trainer.batch import Batch
from lockstep_trainer.config import Job
from lockstep_trainer.injection.bitflips import Injector
from lockstep_trainer.optim.adamw import Pairs
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.replay.compare import Verdict
from lockstep_trainer.replay.rest import Memory
from lockstep_trainer.replay.ring import Disagreement, Ring
from lockstep_trainer.replay.sampling import Sampling
from lockstep_trainer.replay.updates import Updates

log = logging.getLogger(__name__)


class Replay:
    """What the training loop calls in place of the engine. Without ``resilience.corruption`` it is the engine."""

    def __init__(
        self,
        engine: Engine,
        ring: Ring | None,
        *,
        control: dist.ProcessGroup | None = None,
        doubted: tuple[str, ...] = (),
        report: Callable[[Disagreement], None] = lambda _: None,
        agree: Callable[[int], None] = lambda _: None,
    ) -> None:
        """``control`` is a gloo group of the world, ``doubted`` as the ring's; ``report`` hears what ``ring`` does not
        report itself, ``agree`` each step that was compared and shows nothing."""
        self._engine, self._ring, self._report, self._agree = engine, ring, report, agree
        self._doubted = doubted
        self._compared: int | None = None  # the last step that was
        self._first: int | None = None  # and the first
        self._sound = False  # nothing was found in it
        if ring is not None:
            self._memory = Memory(ring.units, control)
            self._updates = Updates(ring.neighbours, engine.meshes.rank, control, ring.known)

    @classmethod
    def of(
        cls,
        job: Job,
        engine: Engine,
        control: dist.ProcessGroup | None,
        injector: Injector | None,
        say: Callable[..., None],
        *,
        doubt: Doubt | None = None,
    ) -> Replay:
        """As the job asks for it; all ranks call it. ``say`` writes a line into the journal, on one rank: its kind, and
        its fields. ``doubt``: what is to be looked at again."""
        spec, recipe = job.spec.resilience.corruption, job.trainer.recipe
        if spec.action is CorruptionAction.OFF:
            return cls(engine, None)

        def report(found: Disagreement) -> None:
            say("corruption", **journal_line(found))

        again, doubted = (doubt.step, doubt.points) if doubt else (None, ())
        sampling = Sampling(recipe.seed, spec.sample, suspected_at=again, doubted=again)
        ring = Ring(engine, control, sampling=sampling, compiled=recipe.compile, doubted=doubted, report=report)
        if injector is not None:
            injector.replaying = lambda: ring.replaying
        return cls(
            engine, ring, control=control, doubted=doubted, report=report,
            agree=lambda step: say("replayed", step=step),
        )  # fmt: skip

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
        self._compared, self._sound = step, self._ring.agreed == step
        self._first = step if self._first is None else self._first
        # The state behind the step before may have been copied since: it is that one which is in doubt.
        self._hear(step - 1, self._memory.found(step))
        if self._ring.units.number == 1:  # which repeats whatever it always does wrong
            self._hear(step, self._ring.known.found())
        return sums

    @contextmanager
    def update(self, step: int, parameters: Pairs, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around the optimizer's step ``step``, whose gradients are ready. All ranks call it."""
        compared = self._compared == step
        if compared:
            with self._engine.section("replay"):
                verdicts = self._updates.before(step, parameters, optimizer)
                known = any(str(verdict.point) in self._doubted for verdict in verdicts)
                self._hear(step, verdicts, calibration=step == self._first and not known)
        yield
        if compared:
            with self._engine.section("replay"):
                self._hear(step, self._updates.after(step))
            if self._sound:
                self._agree(step)
        if self._ring is not None and self.includes(step + 1):
            self._memory.left(parameters, optimizer)

    def agreed(self, step: int) -> bool:
        """Whether ``step`` was compared, its update too, and all ranks agreed at once."""
        return self._sound and self._compared == step

    def _hear(self, step: int, verdicts: tuple[Verdict, ...], *, calibration: bool = False) -> None:
        """Of what is found beside the ring: the step is not computed again, since that would begin from the same."""
        if not verdicts:
            return
        for verdict in verdicts:
            log.warning("step %d: %s", step, verdict.evidence)
        self._sound = False
        self._report(Disagreement(step, 1, verdicts, calibration=calibration, rejected=False))
        self.suspect(step)


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
