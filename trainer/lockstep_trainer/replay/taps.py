"""Takes digests at the points of a micro-batch's computation, by hooks on modules and on unsharded parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lockstep_trainer.model.decoder import Block, Decoder
from lockstep_trainer.model.feedforward import FeedForward
from lockstep_trainer.model.moe import MoE
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.sharded import gathered_parameters
from lockstep_trainer.replay.digest import digest
from lockstep_trainer.replay.points import Phase, Point

Digests = dict[Point, Tensor]
"""An int64 scalar of each point, in the order in which they came."""


class Taps:
    """Hooks on the parts of a model that are on this rank. They do nothing but look whether they are wanted, until
    ``recording`` or ``dropping``.

    Tensors are taken before the collective that spreads them, where there is one, since behind a sum over ranks nobody
    can say which of them was wrong. Inside of compiled blocks nothing is taken: there the blocks' outputs, the
    gradients of their inputs and those of parameters must do.
    """

    def __init__(self, parts: Sequence[nn.Module], stages: Sequence[int], layout: Layout, *, compiled: bool) -> None:
        """``parts`` as an Engine has them, of these stages; ``compiled`` blocks. Every rank builds them at the same
        time, since parameters are gathered once for it. The first forward pass may come before or after."""
        self._layout, self._compiled = layout, compiled
        self._found: Digests | None = None
        self._within = False
        self._dropping = False
        self._handles: list[RemovableHandle] = []
        self._gathered: list[nn.Parameter] = []
        for part, stage in zip(parts, stages, strict=True):
            self._tap_parameters(part, stage)
            if isinstance(part, Decoder):
                self._tap_decoder(part, stage)
            else:
                self._tap_units(part, stage)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- when ---------------------------------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[Digests]:
        """Record the first micro-batch of what is computed within; the digests are all there behind it."""
        found: Digests = {}
        self._found = found
        try:
            yield found
        finally:
            self._found = None

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Within, gradients go nowhere: what is computed leaves none behind."""
        self._dropping = True
        try:
            yield
        finally:
            self._dropping = False

    @contextmanager
    def micro_batch(self, number: int) -> Iterator[None]:
        """Around each piece of the work on the micro-batch ``number``."""
        self._within = number == 0
        try:
            yield
        finally:
            self._within = False
            if self._dropping:
                # A backward pass that a pipeline cuts in two does not call the hooks that drop gradients.
                for parameter in self._gathered:
                    parameter.grad = None

    def _record(self, point: Point, tensor: Tensor) -> None:
        found = self._found
        # Activation checkpointing comes by a second time, in the backward pass.
        if found is None or not self._within or point in found:
            return
        with torch.no_grad():
            found[point] = digest(_local(tensor))

    # --- where --------------------------------------------------------------------------------------------------

    def _tap_parameters(self, part: nn.Module, stage: int) -> None:
        """The gradient of each parameter from one micro-batch, before it is added to others and summed over ranks."""
        for name, parameter in gathered_parameters(part):
            self._tap_parameter(parameter, Point(stage, "backward", name, local=True))

    def _tap_parameter(self, parameter: nn.Parameter, point: Point) -> None:
        if not parameter.requires_grad:
            return

        def record(gradient: Tensor) -> None:
            if self._found is None or not self._within:
                return  # before anything is copied or waited for: most steps come by here
            # In bfloat16 or float32, as FSDP happens to add up: the values are the same.
            local = _local(gradient)
            self._record(point, local.float() if local.dtype == torch.bfloat16 else local)

        def drop(parameter: Tensor) -> None:
            if self._dropping:
                parameter.grad = None

        self._gathered.append(parameter)
        self._handles.append(parameter.register_hook(record))  # type: ignore[no-untyped-call]
        self._handles.append(parameter.register_post_accumulate_grad_hook(drop))  # type: ignore[no-untyped-call]

    def _tap_decoder(self, part: Decoder, stage: int) -> None:
        split = self._layout.tensor > 1
        tap = _Modules(self, stage)
        if part.part.first and part.embedding is not None:
            tap.output("embedding", part.embedding, local=True)
            if split:
                tap.output("embedding", part.embedding, local=False)
        for layer, block in part.blocks.items():
            name = f"blocks.{layer}"
            tap.gradient(name, block, local=not split)
            if self._compiled:
                tap.output(name, block, local=not self._spread)
            else:
                assert isinstance(block, Block)
                self._tap_block(tap, name, block)
        if part.norm is not None and part.head is not None:
            tap.norm("norm", part.norm, split=split)
            tap.gradient("head", part.head, local=True)
            tap.output("head", part.head, local=True)
            tap.output_gradient("head", part.head, local=not split)

    @property
    def _spread(self) -> bool:
        """Ranks of a unit exchange activations within a block."""
        layout = self._layout
        return layout.tensor > 1 or layout.context > 1 or layout.expert > 1

    def _tap_block(self, tap: _Modules, name: str, block: Block) -> None:
        layout = self._layout
        split, around = layout.tensor > 1, layout.context > 1
        attention, ffn = block.attention, block.ffn
        for each in ("attention_norm", "ffn_norm"):
            tap.norm(f"{name}.{each}", getattr(block, each), split=split)
        for each in ("query", "key", "value"):
            # Before keys and values go around; in the backward pass their gradients come back from other ranks.
            tap.output(f"{name}.attention.{each}", getattr(attention, each), local=True)
            if around:
                tap.output_gradient(f"{name}.attention.{each}", getattr(attention, each), local=False)
        tap.output(f"{name}.attention.output", attention.output, local=not around or layout.context_method != "ulysses")
        if split:
            tap.output(f"{name}.attention", attention, local=False)
        tap.gradient(f"{name}.attention", attention, local=not around)
        if isinstance(ffn, FeedForward):
            tap.output(f"{name}.ffn.down", ffn.down, local=True)
            tap.gradient(f"{name}.ffn", ffn, local=True)
            if split:
                tap.output(f"{name}.ffn", ffn, local=False)
        elif isinstance(ffn, MoE):
            exchanged = layout.expert > 1
            tap.output(f"{name}.ffn.router", ffn.router, local=True)
            tap.output(f"{name}.ffn.experts", ffn.experts, local=True)
            tap.gradient(f"{name}.ffn.experts", ffn.experts, local=not exchanged)
            tap.output(f"{name}.ffn", ffn, local=not exchanged)
            tap.gradient(f"{name}.ffn", ffn, local=not exchanged)

    def _tap_units(self, part: nn.Module, stage: int) -> None:
        """A model of the user's own: what FSDP shards by itself stands for its blocks."""
        tap = _Modules(self, stage)
        sharded = {module for module in part.modules() if isinstance(module, FSDPModule)}
        for name, module in part.named_modules():
            if module in sharded:
                tap.output(name or "model", module, local=True)
                if name:
                    tap.gradient(name, module, local=True)


class _Modules:
    """Taps on modules of one stage."""

    def __init__(self, taps: Taps, stage: int) -> None:
        self._taps, self._stage = taps, stage

    def output(self, name: str, module: nn.Module, *, local: bool) -> None:
        """What ``module`` gives: ``local`` as it computed it, else as others see it."""
        taps, point = self._taps, self._point("forward", name, local)

        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                taps._record(point, output)

        taps._handles.append(module.register_forward_hook(record, prepend=local))

    def norm(self, name: str, module: nn.Module, *, split: bool) -> None:
        """A norm; with ``split``, what comes back to it was summed over the tensor ranks."""
        self.output(name, module, local=True)
        if split:
            self.output_gradient(name, module, local=False)

    def gradient(self, name: str, module: nn.Module, *, local: bool) -> None:
        """The gradient of the module's input, as its own backward pass computed it."""
        record = self._recorder(self._point("backward", name, local))

        def tap(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor) and self._wanted(inputs[0]):
                inputs[0].register_hook(record)  # type: ignore[no-untyped-call]

        self._taps._handles.append(module.register_forward_pre_hook(tap))

    def output_gradient(self, name: str, module: nn.Module, *, local: bool) -> None:
        """The gradient of the module's output."""
        record = self._recorder(self._point("backward", f"{name} output", local))

        def tap(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and self._wanted(output):
                output.register_hook(record)  # type: ignore[no-untyped-call]

        self._taps._handles.append(module.register_forward_hook(tap))

    def _wanted(self, tensor: Tensor) -> bool:
        return self._taps._found is not None and self._taps._within and tensor.requires_grad

    def _recorder(self, point: Point) -> Callable[[Tensor], None]:
        taps = self._taps

        def record(gradient: Tensor) -> None:
            taps._record(point, gradient)

        return record

    def _point(self, phase: Phase, name: str, local: bool) -> Point:
        return Point(self._stage, phase, name, local)


def _local(tensor: Tensor) -> Tensor:
    """This rank's own values, arrived."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    if isinstance(tensor, AsyncCollectiveTensor):
        return cast(Tensor, tensor.trigger_wait())  # type: ignore[no-untyped-call]
    return tensor
