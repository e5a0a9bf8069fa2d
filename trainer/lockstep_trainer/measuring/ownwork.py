"""How long a rank computes by itself in a step, waiting for other ranks left out.

In a step all ranks wait for the slowest, so the time of a step tells nothing of a single rank. What does is the time of
windows in which no collective happens. Where they are:

=====================================  ===============================================================================
the layout                             windows
=====================================  ===============================================================================
data and pipeline parallelism          each block behind FSDP's gathering, the head, the loss
with experts                           attention of the blocks that have them: their weights are gathered inside
with tensor parallelism                the core of attention; the dense feed-forward part between its two collectives
with context parallelism               the dense feed-forward part: attention is the ring
a model of your own                    each of its ``blocks``, or all of its forward pass where it has none; the loss
the optimizer                          AdamW: the others exchange gradients, or may
=====================================  ===============================================================================

Backward passes have the same windows, from the gradient of the output to that of the input, but for two: that of a part
of a block that is recomputed, as the repetition's collectives would lie within, and that of the feed-forward part with
tensor parallelism, whose gradient may still be on its way. Schedules that compute the
gradients of weights apart have these outside. In compiled blocks nothing can be measured but the whole. A rank whose
blocks have no window reports nothing.

A window costs two readings of the clock and a hook in each direction: some tens of microseconds of the host for both.
Where the host computes itself, what it stood still is taken out.
On a GPU it lies between two events of its stream, which are read when the step's loss has been: nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lockstep_trainer.batch import Batch
from lockstep_trainer.measuring.clocks import Clock, Gaps, clock_of
from lockstep_trainer.model.decoder import Block, Decoder
from lockstep_trainer.model.feedforward import FeedForward
from lockstep_trainer.own import blocks_of
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout


class OwnWork:
    """The windows of one rank. ``blocks`` is the number of blocks that have one; without any nothing is reported."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.blocks = 0
        self.active = False
        """In a training step; evaluations are not counted."""
        self.gaps: Gaps | None = None
        """Of the backward pass: hears where windows begin and end (``waits``)."""

    @classmethod
    def of(
        cls, engine: Engine, *, compiled: bool, recomputed: bool, stood: Callable[[], float] = lambda: 0.0
    ) -> OwnWork:
        """With windows in the engine's model and around its loss.

        Args:
            engine: Spread over the ranks; no step was made.
            compiled: Blocks are compiled.
            recomputed: Blocks are computed again in the backward pass, wholly or in part.
            stood: Seconds until now that the host stood still: no work where it computes itself.
        """
        own = cls(clock_of(engine.device, stood))
        layout = engine.layout
        for part in engine.parts:
            if isinstance(part, Decoder):
                for block in part.blocks.values():
                    assert isinstance(block, Block)
                    own.blocks += own._measure(block, layout, compiled=compiled, recomputed=recomputed)
                if layout.tensor == 1 and part.head is not None:
                    own._wrap(part.head)
            else:
                units = blocks_of(part) or [part]
                own.blocks += len(units)
                for unit in units:
                    own._wrap(unit)
        if layout.tensor == 1:
            engine.loss = partial(_loss, own, engine.loss)
        return own

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within it the model's windows count."""
        self.active = True
        try:
            yield
        finally:
            self.active = False

    @contextmanager
    def window(self) -> Iterator[None]:
        """A window of its own: no collective happens in the body."""
        begun = self.clock.mark()
        yield
        self.clock.add(begun, self.clock.mark())

    def take(self) -> float | None:
        """Seconds computed since the last call; None where this rank can't tell."""
        seconds = self.clock.take()
        return seconds if self.blocks else None

    def _measure(self, block: Block, layout: Layout, *, compiled: bool, recomputed: bool) -> bool:
        """Whether the block got a window."""
        dense = isinstance(block.ffn, FeedForward)
        if dense and layout.tensor == layout.context == 1:
            self._wrap(block)
            return True
        if compiled:
            return False
        backward = not recomputed
        if isinstance(block.ffn, FeedForward):
            # With tensor parallelism the gradient of its output may still be on its way when it is first used.
            _Between(self, block.ffn, block.ffn.down, backward=backward and layout.tensor == 1)
        if layout.context == 1:
            self._wrap(block.attention if layout.tensor == 1 else block.attention.core, backward=backward)
        return dense or layout.context == 1

    def _wrap(self, module: nn.Module, *, backward: bool = True) -> None:
        # As an attribute of the instance: hooks of FSDP and of tensor parallelism sit on the call, and stay outside.
        module.forward = partial(_forward, self, module.forward, backward)

    def behind(self, source: Any, output: Any) -> None:
        """The backward pass's window: from the gradient of ``output`` to the gradient of ``source``."""
        if not isinstance(source, Tensor) or not isinstance(output, Tensor):
            return
        node = output.grad_fn
        if node is None or not source.requires_grad:
            return
        clock = self.clock
        begun: list[Any] = []

        def begin(_: tuple[Tensor, ...]) -> None:
            if self.gaps:
                self.gaps.begin()
            begun[:] = [clock.mark()]

        def end(_: Tensor) -> None:
            if begun:
                clock.add(begun.pop(), clock.mark())
                if self.gaps:
                    self.gaps.end()

        # Of the node, not of the tensor: FSDP's hook on the tensor, which gathers weights, comes before it.
        node.register_prehook(begin)
        source.register_hook(end)  # type: ignore[no-untyped-call]


class _Between:
    """The window from a module's entry to the last of its parts, whose own hooks redistribute what comes out of it."""

    def __init__(self, own: OwnWork, module: nn.Module, last: nn.Module, *, backward: bool) -> None:
        self._own, self._backward = own, backward
        self._entered: tuple[Any, Any] | None = None
        self._module, self._last = module.forward, last.forward
        module.forward, last.forward = self._enter, self._leave

    def _enter(self, x: Tensor) -> Any:
        self._entered = (self._own.clock.mark(), x) if self._own.active else None
        return self._module(x)

    def _leave(self, inside: Tensor) -> Any:
        entered, self._entered = self._entered, None
        if entered is None:
            return self._last(inside)
        begun, x = entered
        try:
            output = self._last(inside)
        finally:  # what is computed again ends by an exception, once the backward pass has all that it needs
            self._own.clock.add(begun, self._own.clock.mark())
        if self._backward:
            self._own.behind(x, output)
        return output


def _forward(own: OwnWork, forward: Callable[..., Any], backward: bool, *args: Any, **named: Any) -> Any:
    if not own.active:
        return forward(*args, **named)
    if own.gaps:
        own.gaps.drop()
    begun = own.clock.mark()
    try:
        output = forward(*args, **named)
    finally:  # see _Between
        own.clock.add(begun, own.clock.mark())
    if backward and args:
        own.behind(args[0], output)
    return output


def _loss(own: OwnWork, loss: Callable[..., Any], logits: Tensor, targets: Tensor, denominator: Any) -> Any:
    if not own.active:
        return loss(logits, targets, denominator)
    begun = own.clock.mark()
    # A view, since FSDP's hook on the logits gathers weights, and hooks of one tensor run in their order.
    logits = logits.view_as(logits)
    total, sums = loss(logits, targets, denominator)
    own.clock.add(begun, own.clock.mark())
    own.behind(logits, total)
    return total, sums


@dataclass(frozen=True, slots=True)
class Amount:
    """What a rank computes on in a step."""

    tokens: int
    squares: int
    """Σ length² over its documents, what attention's work grows with; a sample is one where they are not masked."""

    @classmethod
    def of(cls, batch: Batch, *, context: int) -> Amount:
        """Of a data-parallel rank's batch, still on the host, of which ``context`` ranks share each sequence."""
        tokens = batch.inputs.numel()
        squares = tokens * batch.inputs.shape[1]
        if batch.positions is not None:
            squares = 2 * int(batch.positions.sum()) + tokens  # Σ (2p + 1) over p < length is length²
        return cls(tokens // context, squares // context)
