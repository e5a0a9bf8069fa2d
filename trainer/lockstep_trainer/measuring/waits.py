"""How long a rank waits in collectives, by dimension of the mesh: for the last rank of its group, and the transfer.

Not all collectives are measured, but the same ones on all ranks, and where a rank waits, not where a transfer is asked
for: what hides behind computation holds nobody up.

==========  ===========================================================================================================
dimension   measured
==========  ===========================================================================================================
data        FSDP's gathering in front of the model and of each block; where blocks have no collectives of their own and
            there is no pipeline, also what lies between their backward passes, gradients' sums among it, until the last
            gradient has arrived
tensor      forward: the gathering in front of attention and of dense feed-forward parts
context     forward: the exchange around attention's core, or of keys and values
pipeline    between two pieces of work of the schedule: the bubble is in it
==========  ===========================================================================================================

All-reductions over the whole world, at the begin of a step and behind the backward pass, are of no dimension: there
everybody waits for the slowest rank of the job. Compiled blocks have no place to measure tensor or context.

On a GPU the time is that of its stream, between two events as in ``ownwork``: the stream waits for a collective where
its result is used. This was written from torch's documentation and run with gloo only, not on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

from torch import nn

from lockstep_trainer.measuring.clocks import Clock, Gaps
from lockstep_trainer.measuring.ownwork import OwnWork
from lockstep_trainer.model.decoder import Block, Decoder
from lockstep_trainer.model.feedforward import FeedForward
from lockstep_trainer.own import blocks_of
from lockstep_trainer.parallel.context import GatheredCore, UlyssesCore
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.steprecord import DIMENSIONS


class Waits:
    """Of one rank; a clock for each dimension that it has peers in."""

    def __init__(self, own: OwnWork, clocks: dict[str, Clock]) -> None:
        self._own = own
        self.clocks = clocks
        self._pieces: Gaps | None = None

    @classmethod
    def of(cls, engine: Engine, own: OwnWork, *, compiled: bool, clock: Callable[[], Clock]) -> Waits:
        """With marks in the engine's model and schedule.

        Args:
            engine: Has the windows of ``own``; no step was made.
            own: Says what is within a training step.
            compiled: Blocks are compiled.
            clock: Makes one.
        """
        layout = engine.layout
        waits = cls(own, {name: clock() for name in DIMENSIONS if peers(layout)[name] > 1 and own.blocks})
        for part in engine.parts:
            blocks = list(part.blocks.values()) if isinstance(part, Decoder) else blocks_of(part)
            for unit in (part, *(block for block in blocks if block is not part)):
                waits._in_front_of(unit, "data")
            if isinstance(part, Decoder) and not compiled:
                for block in blocks:
                    waits._inside(cast(Block, block))
        if layout.pipeline > 1 and "pipeline" in waits.clocks:
            waits._pieces = Gaps(waits.clocks["pipeline"])
            engine.around = partial(waits._piece, engine.around)
        elif "data" in waits.clocks and layout.tensor == layout.context == 1 and not _mixture(engine):
            own.gaps = Gaps(waits.clocks["data"])
        return waits

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around forward and backward passes of a step that is measured."""
        if self._pieces:
            self._pieces.end()  # the first piece may have to wait for another stage
        yield
        if self._pieces:
            self._pieces.drop()
        if self._own.gaps:
            self._own.gaps.begin()

    def take(self) -> dict[str, float]:
        """Dimension → seconds since the last call."""
        return {name: clock.take() for name, clock in self.clocks.items()}

    def _inside(self, block: Block) -> None:
        self._in_front_of(block.attention, "tensor")
        if isinstance(block.ffn, FeedForward):
            self._in_front_of(block.ffn, "tensor")
        core: Any = block.attention.core
        if "context" in self.clocks and isinstance(core, GatheredCore | UlyssesCore):
            core.exchange = partial(self._during, self.clocks["context"], core.exchange)  # type: ignore[method-assign]

    def _in_front_of(self, module: nn.Module, dimension: str) -> None:
        """From the call of ``module`` to its body: hooks that gather lie between."""
        clock = self.clocks.get(dimension)
        if clock is None:
            return
        begun: list[Any] = []
        body = module.forward

        def called(*_: Any) -> None:
            begun[:] = [clock.mark()] if self._own.active else []

        def forward(*args: Any, **named: Any) -> Any:
            if begun:
                clock.add(begun.pop(), clock.mark())
            return body(*args, **named)

        module.register_forward_pre_hook(called, prepend=True)
        module.forward = forward

    def _during(self, clock: Clock, exchange: Callable[..., Any], *args: Any) -> Any:
        if not self._own.active:
            return exchange(*args)
        begun = clock.mark()
        received = exchange(*args)
        clock.add(begun, clock.mark())
        return received

    @contextmanager
    def _piece(self, around: Callable[[int], AbstractContextManager[None]], micro_batch: int) -> Iterator[None]:
        assert self._pieces is not None
        if self._own.active:
            self._pieces.begin()
        with around(micro_batch):
            yield
        if self._own.active:
            self._pieces.end()


def peers(layout: Layout) -> dict[str, int]:
    """Dimension → ranks that differ in it alone."""
    return {
        "data": layout.data_width,
        "pipeline": layout.pipeline,
        "tensor": layout.tensor,
        "context": layout.context,
    }


def _mixture(engine: Engine) -> bool:
    """Some blocks send tokens to experts on other ranks, or compute outside of their windows."""
    return any(
        isinstance(part, Decoder)
        and any(not isinstance(cast(Block, block).ffn, FeedForward) for block in part.blocks.values())
        for part in engine.parts
    )
