"""Whether a rank's memory keeps its bits between two updates of the optimizer: its shards of the parameters, and the
optimizer's moments.

Both are only read in between. A bit that flips there is no matter of one unit: all of them gather the same wrong
weight, and compute alike. So each rank looks at its own memory, behind an update and once more before the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.optim.adamw import Pairs
from lockstep_trainer.parallel.sharded import local_shard
from lockstep_trainer.replay.changed import changed_tensors, judge_changed, on_purpose
from lockstep_trainer.replay.compare import Verdict
from lockstep_trainer.replay.digest import digest
from lockstep_trainer.replay.units import Units

log = logging.getLogger(__name__)


class Memory:
    """One rank's look at what it holds; all ranks call the same methods in the same order."""

    def __init__(self, units: Units, control: dist.ProcessGroup | None) -> None:
        """``control`` is a gloo group of the world."""
        self._units, self._control = units, control
        self.looks = True
        """False: something speaks against comparing memory in this generation."""
        self._then: Resting | None = None

    def left(self, parameters: Pairs, optimizer: torch.optim.Optimizer) -> None:
        """An update was made, and the next step is compared."""
        if self.looks:
            self._then = Resting(parameters, optimizer)

    def found(self, step: int) -> tuple[Verdict, ...]:
        """The update of ``step`` comes next: verdicts on whose memory is not as the one before has left it."""
        then, self._then = self._then, None
        if then is None:
            return ()
        changed = changed_tensors(*then.compared(), self._control)
        if on_purpose(changed):
            log.warning(
                "parameters or moments were changed on purpose between the updates of steps %d and %d (%s): this "
                "generation does not look at memory any more", step - 1, step, next(filter(None, changed))[0],
            )  # fmt: skip
            self.looks = False
            return ()
        return judge_changed(
            self._units, changed, phase="forward", confidence=1.0,
            evidence=lambda rank, what: (
                f"the memory of rank {rank} did not keep what the update of step {step - 1} left there: {what} had "
                "other bits before the next one"
            ),
        )  # fmt: skip


class Resting:
    """What this rank held at one time: 64 bits of each tensor, on its device, which the host does not wait for."""

    def __init__(self, parameters: Pairs, optimizer: torch.optim.Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._then = dict(self._now())

    def compared(self) -> tuple[list[str], Tensor]:
        """Names of the tensors, in order, and which of them have other bits now, (names,) bool, on their device. Those
        that were not there then are passed over."""
        pairs = [(name, self._then[name] != now) for name, now in self._now() if name in self._then]
        return [name for name, _ in pairs], torch.stack([differs for _, differs in pairs])

    def _now(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters:
            yield name, digest(local_shard(parameter))
            if parameter in self._optimizer.state:
                for key, value in self._optimizer.state[parameter].items():
                    # A count of steps may live on the host, and a user's optimizer may keep what is no plain tensor.
                    if not isinstance(value, Tensor) or value.device != parameter.device:
                        continue
                    if type(local := local_shard(value)) is Tensor and local.is_floating_point():
                        yield f"{name}, {key}", digest(local)
