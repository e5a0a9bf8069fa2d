"""Faults made on purpose: bits that flip in what a rank computes, to see that they are found.

Off unless the variable is in a worker's environment, which its agent decides. The faults of an ``Injector`` may change
between steps; the places where they strike are prepared once, when it is made.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from lockstep_trainer.errors import UserError
from lockstep_trainer.model.decoder import Block, Decoder
from lockstep_trainer.model.feedforward import FeedForward
from lockstep_trainer.model.moe import MoE
from lockstep_trainer.parallel.sharded import gathered_parameters

VARIABLE = "LOCKSTEP_FAULTS"
"""A JSON list of faults."""

Site = Literal["product", "activation", "inputGradient", "gradient", "weight"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A bit that flips."""

    rank: int
    site: Site
    """product: of the queries' projection. activation: what the feed-forward part gives, before ranks add it up.
    inputGradient: of the feed-forward part. gradient: of the query projection's weight, from one micro-batch. weight:
    of the query projection, as this rank reads it in the forward pass."""
    layer: int = 0
    bit: int = 30
    """Of the element; modulo its size."""
    element: int = 0
    """Of the rank's own values; modulo their number."""
    rate: float = 1.0
    """Share of the micro-batches that are hit: 1 is a fault that is always there."""
    when: Literal["always", "step", "replay"] = "always"
    """In the step itself, in replays, or in both."""
    seed: int = 0
    on: str = ""
    """Name of the pod or node whose hardware it is; empty: it goes with the rank, wherever that is."""
    after: int = 0
    """How often it could have struck before it first does, in one process."""

    def stream(self) -> random.Random:
        """Each time that it can strike, the next number is drawn: it does where that is below ``rate``."""
        return random.Random(f"{self.seed}/{self.rank}/{self.site}/{self.layer}")


_FAULTS = TypeAdapter(list[Fault])


class _Armed:
    """A fault and its chances so far."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self._drawn, self._passed = fault, fault.stream(), 0

    def strikes(self) -> bool:
        """Whether it does this time."""
        hit = self._drawn.random() < self.fault.rate
        self._passed += 1
        return hit and self._passed > self.fault.after


class Injector:
    """Strikes the parts of a model on this rank. Made before anything that looks at gradients, so that it comes first;
    what looks at modules may be attached before or after."""

    def __init__(self, parts: Sequence[nn.Module], rank: int, faults: Sequence[Fault] = ()) -> None:
        """Every rank makes it at the same time. Raises UserError where a part is not a decoder."""
        self.replaying: Callable[[], bool] = lambda: False
        self._rank = rank
        self.armed: tuple[Fault, ...] = ()
        """Of all ranks."""
        self.layers: tuple[int, ...] = ()
        """That this rank has, by their numbers in the whole model."""
        self._faults: dict[tuple[int, Site], list[_Armed]] = {}
        for part in parts:
            if not isinstance(part, Decoder):
                raise UserError(f"{VARIABLE}: faults strike the built-in decoder only; train a preset")
            self._prepare(part)
        self.arm(faults)

    @classmethod
    def from_environment(cls, parts: Sequence[nn.Module], rank: int, *, compiled: bool) -> Self | None:
        """None where the environment names no faults; raises UserError where it names what can't be read, or blocks
        are ``compiled``."""
        text = os.environ.get(VARIABLE)
        if text is None:
            return None
        if compiled:
            raise UserError(
                f"{VARIABLE}: faults can't strike within compiled blocks; set trainer.recipe.compile to false"
            )
        try:
            return cls(parts, rank, _FAULTS.validate_json(text))
        except ValidationError as error:
            raise UserError(f"{VARIABLE}: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None

    def arm(self, faults: Sequence[Fault]) -> None:
        """From now on these, and no others."""
        self._faults.clear()
        self.armed = tuple(faults)
        here = ("", os.environ.get("LOCKSTEP_POD_NAME"), os.environ.get("LOCKSTEP_NODE_NAME"))
        for fault in faults:
            if fault.rank == self._rank and fault.on in here:
                self._faults.setdefault((fault.layer, fault.site), []).append(_Armed(fault))

    # --- where --------------------------------------------------------------------------------------------------

    def _prepare(self, part: Decoder) -> None:
        """Modules are struck within their ``forward``, so that hooks see what came of it."""
        for name, block in part.blocks.items():
            layer = int(name)
            self.layers += (layer,)
            assert isinstance(block, Block)
            query, ffn = block.attention.query, block.ffn
            _wrap(query, partial(self._product, layer, query))
            made: nn.Module = ffn.down if isinstance(ffn, FeedForward) else cast(MoE, ffn).experts
            _wrap(made, partial(self._activation, layer))
            _wrap(ffn, partial(self._input_gradient, layer))
        for name, parameter in gathered_parameters(part):
            words = name.split(".")
            if words[0] == "blocks" and words[2:] == ["attention", "query", "weight"]:
                parameter.register_hook(partial(self._gradient, int(words[1])))  # type: ignore[no-untyped-call]

    def _product(self, layer: int, query: nn.Module, forward: Callable[..., Any], x: Tensor, *args: Any) -> Any:
        weight = query.weight
        assert isinstance(weight, Tensor)
        struck = self._due(layer, "weight")
        for fault in struck:
            flip(weight, fault)
        y = forward(x, *args)
        for fault in struck:  # the next micro-batch may find the same memory
            flip(weight, fault)
        for fault in self._due(layer, "product"):
            flip(y, fault)
        return y

    def _activation(self, layer: int, forward: Callable[..., Any], *args: Any) -> Any:
        y = forward(*args)
        for fault in self._due(layer, "activation"):
            flip(y, fault)
        return y

    def _input_gradient(self, layer: int, forward: Callable[..., Any], x: Tensor, *args: Any) -> Any:
        if (layer, "inputGradient") not in self._faults:
            return forward(x, *args)
        return forward(_Struck.apply(x, lambda: self._due(layer, "inputGradient")), *args)

    def _gradient(self, layer: int, gradient: Tensor) -> Tensor | None:
        due = self._due(layer, "gradient")
        if not due:
            return None
        gradient = gradient.clone()
        for fault in due:
            flip(gradient, fault)
        return gradient

    def _due(self, layer: int, site: Site) -> list[Fault]:
        """The faults that strike now."""
        armed = self._faults.get((layer, site))
        if not armed:
            return []
        now = "replay" if self.replaying() else "step"
        return [each.fault for each in armed if each.fault.when in ("always", now) and each.strikes()]


def _wrap(module: nn.Module, wrapper: Callable[..., Any]) -> None:
    module.forward = partial(wrapper, module.forward)


class _Struck(torch.autograd.Function):
    """The identity, whose gradient is struck."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, due: Callable[[], list[Fault]]) -> Tensor:
        ctx.due = due
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        due = ctx.due()
        if due:
            gradient = gradient.clone()
        for fault in due:
            flip(gradient, fault)
        return gradient, None


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def flip(tensor: Tensor, fault: Fault) -> None:
    """Flip the fault's bit in memory, behind autograd's back, as hardware does."""
    flip_bit(tensor, element=fault.element, bit=fault.bit)


def flip_bit(tensor: Tensor, *, element: int, bit: int) -> None:
    """Flip a bit in memory, behind autograd's back, as hardware does.

    Args:
        tensor: Of which this rank's own values count.
        element: Of them, modulo their number.
        bit: Of the element, modulo its size.
    """
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    local = local.trigger_wait() if isinstance(local, AsyncCollectiveTensor) else local  # type: ignore[no-untyped-call]
    if not local.numel():
        return
    index = tuple(int(place) for place in torch.unravel_index(torch.tensor(element % local.numel()), local.shape))
    word = _WORDS[local.element_size()]
    bits = 8 * local.element_size()
    mask = 1 << bit % bits
    mask = mask - 2**bits if mask >= 2 ** (bits - 1) else mask
    flipped = local.data[index].reshape(1).view(word) ^ mask
    local.data[index] = flipped.view(local.dtype)[0]
