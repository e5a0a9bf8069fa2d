"""The sentinels in the training loop: what they are shown, and whom they tell.

All ranks are shown the same figures, so that all come to the same opinion without a word. Training is only looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep_api.v1alpha1 import SentinelAction
from lockstep_trainer.config import Job
from lockstep_trainer.optim.updatesize import EVERY, rms, update_squares
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.sentinels import Sentinels


class Lookout:
    """One rank's; with ``sentinels`` None nothing is looked at."""

    def __init__(
        self,
        sentinels: Sentinels | None,
        measure: Callable[[], Tensor] | None,
        *,
        say: Callable[..., None],
        suspect: Callable[[int], None],
    ) -> None:
        """
        Args:
            sentinels: Who judge.
            measure: The update's size, summed over the ranks; None where it can't be measured.
            say: Writes a line into the journal, on one rank: its kind, and its fields.
            suspect: Told the step of which a figure is unusual.
        """
        self._sentinels, self._measure, self._say, self._suspect = sentinels, measure, say, suspect
        self._update: Tensor | None = None

    @classmethod
    def of(
        cls,
        job: Job,
        parameters: Sequence[tuple[str, nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        layout: Layout,
        second_copies: Collection[str],
        *,
        say: Callable[..., None],
        suspect: Callable[[int], None],
    ) -> Lookout:
        """As ``resilience.sentinels`` says."""
        if job.spec.resilience.sentinels.action is SentinelAction.OFF:
            return cls(None, None, say=say, suspect=suspect)

        def measure() -> Tensor:
            assert isinstance(optimizer, torch.optim.AdamW)
            totals = update_squares(parameters, optimizer, layout, second_copies)
            if dist.is_initialized():
                dist.all_reduce(totals)
            return totals

        # Muon's matrices have updates of one size whatever its moments say.
        known = isinstance(optimizer, torch.optim.AdamW)
        return cls(Sentinels(), measure if known else None, say=say, suspect=suspect)

    def look(self, step: int, loss: float, norm: float) -> None:
        """At the figures of ``step``, and at the update of the step before it where that was measured."""
        if self._sentinels is None:
            return
        update, self._update = self._update, None
        said = self._sentinels.step(step, loss=loss, gradientNorm=norm)
        if update is not None:
            said += self._sentinels.step(step - 1, updateSize=rms(update))
        for one in said:
            if not one.ended:
                self._suspect(one.step)
            self._say("outlier", signal=one.signal, step=one.step, evidence=one.evidence, ended=one.ended)

    def updated(self, step: int) -> None:
        """The optimizer's step ``step`` was made. Every rank calls it."""
        if self._measure is not None and step % EVERY == 0:
            # Read with the next step's loss, which is waited for anyway.
            self._update = self._measure()
