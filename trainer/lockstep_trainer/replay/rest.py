"""Whether a rank's memory keeps its bits between two updates of the optimizer: its shards of the parameters, and the
optimizer's moments.

Both are only read in between. A bit that flips there is no matter of one unit: all of them gather the same wrong
weight, and compute alike. So each rank looks at its own memory, behind an update and once more before the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import compress

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.agreement import anywhere, from_all
from lockstep_trainer.optim.adamw import Pairs
from lockstep_trainer.parallel.sharded import local_shard
from lockstep_trainer.replay.compare import Verdict
from lockstep_trainer.replay.digest import digest
from lockstep_trainer.replay.points import Point
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
        names, differ = then.compared()
        if not anywhere(differ.any()):
            return ()
        changed = from_all(tuple(compress(names, differ.tolist())), self._control)
        if by_software(changed):
            log.warning(
                "parameters or moments were changed on purpose between the updates of steps %d and %d (%s): this "
                "generation does not look at memory any more", step - 1, step, next(filter(None, changed))[0],
            )  # fmt: skip
            self.looks = False
            return ()
        return judge_memory(self._units, changed, step - 1)


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


def by_software(changed: Sequence[Sequence[str]]) -> bool:
    """Whether what changed, by rank, was changed on purpose: memory does not fail on more than half of the ranks at
    once, while a callback, or an optimizer that trades weights for an evaluation, does the same on all."""
    return 2 * sum(map(bool, changed)) > len(changed)


def judge_memory(units: Units, changed: Sequence[Sequence[str]], since: int) -> tuple[Verdict, ...]:
    """A verdict on each rank of which something has changed since the update of step ``since``; ``changed``: the names,
    by rank. Pure."""
    return tuple(_verdict(units, rank, names, since) for rank, names in enumerate(changed) if names)


def _verdict(units: Units, rank: int, names: Sequence[str], since: int) -> Verdict:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    evidence = (
        f"the memory of rank {rank} did not keep what the update of step {since} left there: {names[0]}{more} had "
        "other bits before the next one"
    )
    point = Point(units.first_stage(rank), "forward", names[0], local=True)
    return Verdict("intermittent", units.unit(rank), (rank,), point, 1.0, evidence)
