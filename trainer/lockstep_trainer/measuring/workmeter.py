"""What a rank's record of a step says of its own work: for the search for slow ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

from lockstep_api.v1alpha1 import StragglerAction
from lockstep_trainer.batch import Batch
from lockstep_trainer.config import Job
from lockstep_trainer.injection.drag import Drag
from lockstep_trainer.measuring.clockrate import ClockRate
from lockstep_trainer.measuring.clocks import clock_of
from lockstep_trainer.measuring.hostpauses import HostPauses, Stood
from lockstep_trainer.measuring.ownwork import Amount, OwnWork
from lockstep_trainer.measuring.pairmeter import LEAST, PairMeter
from lockstep_trainer.measuring.waits import Waits
from lockstep_trainer.measuring.yardstick import Yardstick
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.steprecord import OwnStep


class WorkMeter:
    """One rank's; with ``own`` None nothing is measured."""

    def __init__(
        self,
        own: OwnWork | None,
        device: torch.device,
        *,
        waits: Waits | None = None,
        pairs: PairMeter | None = None,
        host: HostPauses | None = None,
        rate: ClockRate | None = None,
        context: int = 1,
        local_step: bool = False,
    ) -> None:
        """``host`` and ``rate`` are closed with it; ``context``: ranks that share a sequence; ``local_step``: the
        optimizer's step does not communicate."""
        self._own, self._waits, self._pairs = own, waits, pairs
        self._host, self._rate, self._device = host, rate, device
        self._context, self._local_step = context, local_step
        self._ahead = device.type == "cuda"
        self._yardstick = Yardstick(device) if own and own.blocks else None
        self._amount = Amount(0, 0)
        self._measured = True
        self._drag: Drag | None = None

    @classmethod
    def of(cls, job: Job, engine: Engine, optimizer: torch.optim.Optimizer) -> WorkMeter:
        """As ``resilience.stragglers`` says."""
        if job.spec.resilience.stragglers.action == StragglerAction.OFF:
            return cls(None, engine.device)
        recipe = job.trainer.recipe
        recomputed = recipe.activation_checkpointing != "none"
        host = HostPauses()
        own = OwnWork.of(engine, compiled=recipe.compile, recomputed=recomputed, stood=host.seconds)
        waits = Waits.of(engine, own, compiled=recipe.compile, clock=partial(clock_of, engine.device, host.seconds))
        ranks, pairs = engine.layout.world_size, None
        if ranks >= LEAST:  # on all ranks, whether they have windows or not
            pairs = PairMeter(engine.meshes.rank, ranks, engine.device)
        # Others exchange gradients, or may.
        local = isinstance(optimizer, torch.optim.AdamW)
        return cls(
            own,
            engine.device,
            waits=waits,
            pairs=pairs,
            host=host,
            rate=ClockRate.of(engine.device),
            context=engine.layout.context,
            local_step=local,
        )

    def begin(self) -> None:
        """Before the first step, by the thread that makes them."""
        if self._host:
            self._host.begin()
        if self._rate:
            self._rate.begin()

    def close(self) -> None:
        """Nothing is measured any more."""
        if self._host:
            self._host.close()
        if self._rate:
            self._rate.close()

    def batch(self, batch: Batch) -> None:
        """The step's batch, still on the host."""
        if self._own:
            self._amount = Amount.of(batch, context=self._context)

    @contextmanager
    def windows(self, *, measured: bool = True) -> Iterator[None]:
        """Around forward and backward passes. Not ``measured``: more is computed than the batch, nothing is told."""
        self._measured = measured
        # A GPU works behind its host and need not wait for it here. It has nothing to do elsewhere: between two steps
        # the host knows the loss.
        hidden = self._host.hidden() if self._host and self._ahead else nullcontext()
        own = self._own.step() if self._own and measured else nullcontext()
        waits = self._waits.step() if self._waits and measured else nullcontext()
        with hidden, own:
            with waits:
                yield
            if self._own and self._drag is not None:
                with self._own.window():
                    self._drag.work()

    @property
    def can_drag(self) -> bool:
        """Whether own work is measured, by which it is made longer."""
        return self._yardstick is not None

    def drag(self, share: float) -> None:
        """From now on the own work takes longer by this share, and so does the product that the device is measured by:
        what a slow device looks like. 0: no longer. Where ``can_drag``."""
        assert self._yardstick is not None
        self._drag = Drag(self._device, share) if share else None
        self._yardstick.drag = self._drag

    def optimizer(self) -> AbstractContextManager[None]:
        """Around the optimizer's step."""
        return self._own.window() if self._own and self._local_step else nullcontext()

    def device_due(self, step: int) -> bool:
        """Whether the device is measured behind this step."""
        return self._yardstick is not None and self._yardstick.due(step)

    def measure_device(self) -> None:
        """Measure it: the figures come with the next step's record, or the one after it."""
        if self._yardstick:
            self._yardstick.measure()

    def link_due(self, step: int) -> bool:
        """Whether the link to another rank is measured behind this step: the same ones on all ranks."""
        return self._pairs is not None and self._pairs.due(step)

    def measure_link(self, step: int) -> None:
        """Measure it, on all ranks. The figures come as those of the device."""
        if self._pairs:
            self._pairs.measure(step)

    def take(self) -> OwnStep | None:
        """Of the step that ends now; None where nothing is measured."""
        seconds = self._own.take() if self._own else None
        host = self._host.take() if self._host else Stood(0.0, 0.0, 0.0)
        waited = self._waits.take() if self._waits else {}
        if seconds is None or not self._measured:
            return None
        if self._drag is not None:
            self._drag.measured(seconds)
        product, copy = (self._yardstick and self._yardstick.take()) or (None, None)
        peer, link = (self._pairs and self._pairs.take()) or (None, None)
        return OwnStep(
            seconds,
            self._amount.tokens,
            self._amount.squares,
            product,
            copy,
            host=host.seconds,
            garbage=host.garbage,
            throttled=host.throttled,
            waited=waited,
            peer=peer,
            link=link,
            clock=self._rate.newest() if self._rate else None,
        )
