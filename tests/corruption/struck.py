"""Injectors that know where they struck, and flips in what a rank holds in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from corruption.trial import Trial
from lockstep_trainer.injection.bitflips import Fault, Injector, Site, flip
from lockstep_trainer.model.decoder import Block, Decoder
from lockstep_trainer.model.feedforward import FeedForward
from lockstep_trainer.replay.updates import updated

Where = Literal["first", "other", "replay"]
"""In the step's own first micro-batch, in another of the step, in a replay."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One time that a fault struck."""

    step: int
    where: Where
    sampled: bool
    """The step is replayed."""


class Recorded(Injector):
    """Keeps its strikes, and strikes only where it may."""

    def __init__(self, parts: Sequence[nn.Module], rank: int) -> None:
        self.now: Callable[[], Strike] = lambda: Strike(0, "first", False)
        self.may: Callable[[Strike], bool] = lambda _: True
        self.strikes: list[Strike] = []
        super().__init__(parts, rank)

    def _due(self, layer: int, site: Site) -> list[Fault]:
        now = self.now()
        if not self.may(now):
            return []
        due = super()._due(layer, site)
        self.strikes += [now] * len(due)
        return due


class Between:
    """Flips a product of a tensor rank after its digest was taken, before the ranks add theirs up. To be made before
    the ring, whose hooks then come first."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.fault: Fault | None = None
        self.strikes: list[Strike] = []
        self.now: Callable[[], Strike] = lambda: Strike(0, "first", False)
        for part in parts:
            assert isinstance(part, Decoder)
            for name, block in part.blocks.items():
                assert isinstance(block, Block)
                assert isinstance(block.ffn, FeedForward)
                for site, module in (("product", block.attention.output), ("activation", block.ffn.down)):
                    module.register_forward_hook(partial(self._strike, int(name), site), prepend=True)

    def _strike(self, layer: int, site: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self.fault is not None and (self.fault.layer, self.fault.site) == (layer, site):
            flip(output, self.fault)
            self.strikes.append(self.now())


class Device:
    """A rank's device that now and then makes a wrong number in the optimizer's update of one parameter's piece."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.strikes: list[Strike] = []
        self.now: Callable[[], Strike] = lambda: Strike(0, "first", False)
        self._drawn = random.Random()

    def break_down(self, fault: Fault) -> None:
        """From now on."""
        self.fault, self._drawn = fault, fault.stream()

    def updated(self, taken: Tensor, group: dict[str, Any], steps: Tensor) -> Tensor:
        """In place of ``updates.updated``: for its own rank and for others."""
        made = updated(taken, group, steps)
        self._strike(made[0])
        return made

    def made(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """An update was made, of these."""
        for _, parameter in parameters:
            self._strike(parameter.detach())

    def _strike(self, parameter: Tensor) -> None:
        """The same bit each time."""
        if self.fault is not None and self._drawn.random() < self.fault.rate:
            flip(parameter, self.fault)
            self.strikes.append(self.now())


def strike_memory(
    trial: Trial, parameters: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> None:
    """Flip the trial's bit in what this rank holds of the query projection of its layer: the parameter, the optimizer's
    first moment, or the gradient's sum."""
    name = f"blocks.{trial.fault.layer}.attention.query.weight"
    parameter = next(parameter for each, parameter in parameters if each == name)
    tensors = {"shard": parameter, "sum": parameter.grad, "optimizer": optimizer.state[parameter].get("exp_avg")}
    tensor = tensors[trial.kind]
    assert isinstance(tensor, DTensor)
    flip(tensor.detach(), trial.fault)
