"""Pipeline parallelism: the parts of the model on each rank, a head tied across ranks, and torch's schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    ScheduleGPipe,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)

from lockstep_api.v1alpha1.parallelism import V_SCHEDULES
from lockstep_trainer.model.decoder import Decoder, Part
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.stages import Costs, split_layers

# ------------------------------------------------------------------------------------------ parts of the model


def parts_of(layout: Layout, pipeline_rank: int, costs: Costs) -> list[Part]:
    """The parts of the model on a pipeline rank, one for each of its stages."""
    split = split_layers(costs, layout.stages)
    last = layout.stages - 1
    return [Part(split[stage], first=stage == 0, last=stage == last) for stage in layout.stages_of(pipeline_rank)]


# ------------------------------------------------------------------------------------------------- a tied head


def share_tied(parts: Sequence[nn.Module]) -> None:
    """Let first and last stage on the same rank hold one and the same embedding: one parameter, one gradient.

    With FSDP, too: each of the two stages gathers it for itself, and both reduce into the gradient of the one shard.
    Comes behind memory (``to_empty``), which makes new parameters, and before the first step.
    """
    tables = [part.embedding for part in parts if isinstance(part, Decoder) and part.embedding is not None]
    if len(tables) == 2 and tables[0].weight is not tables[1].weight:
        tables[1].weight = tables[0].weight


def second_copies(parts: Sequence[nn.Module]) -> frozenset[str]:
    """Names of the parameters here that another rank has first: a tied head's embedding on the last pipeline rank."""
    decoders = [part for part in parts if isinstance(part, Decoder)]
    if any(part.part.first for part in decoders):
        return frozenset()
    return frozenset("embedding.weight" for part in decoders if part.embedding is not None)


def add_tied_gradients(parts: Sequence[nn.Module], pair: dist.ProcessGroup | None) -> None:
    """Sum the gradients of the two copies of a tied embedding, on the first and the last pipeline rank (``pair``).

    Once per step, behind the backward pass. Does nothing without a pair, a tied head, or where one rank has both ends.
    """
    tables = [part.embedding for part in parts if isinstance(part, Decoder) and part.embedding is not None]
    tied = any(isinstance(part, Decoder) and part.config.tie_embeddings for part in parts)
    if pair is None or not tied or len(tables) != 1:
        return
    gradient = tables[0].weight.grad
    assert gradient is not None
    # The two ranks have the same part of the table: they differ in the pipeline coordinate only.
    dist.all_reduce(getattr(gradient, "_local_tensor", gradient), group=pair)


# --------------------------------------------------------------------------------------------------- schedules


@dataclass(frozen=True, slots=True)
class Shapes:
    """What travels between stages for one micro-batch. It is known beforehand, so that torch has not to find it out by
    running the model, collectives included, on memory without values."""

    samples: int
    tokens: int  # of a sample on this context shard
    hidden_tokens: int  # the same, divided over the tensor ranks
    dim: int
    vocabulary: int  # on this tensor rank
    dtype: torch.dtype  # between blocks

    def inputs(self) -> Tensor:
        """Like the first stage's input."""
        return torch.empty(self.samples, self.tokens, dtype=torch.int64, device="meta")

    def hidden(self) -> Tensor:
        """Like what a stage hands to the next."""
        shape = (self.samples, self.hidden_tokens, self.dim)
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)

    def logits(self) -> Tensor:
        """Like the last stage's output."""
        shape = (self.samples, self.tokens, self.vocabulary)
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)


Order = Literal["step", "forward", "alone"]


def build_schedule(
    parts: Sequence[nn.Module],
    layout: Layout,
    group: dist.ProcessGroup,
    *,
    shapes: Shapes,
    micro_batches: int,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
    device: torch.device,
    order: Order = "step",
    around: Callable[[int], AbstractContextManager[None]] = nullcontext,  # type: ignore[assignment]
) -> Any:
    """torch's schedule of this layout over this rank's parts, for its ``step``; with ``order`` forward one for
    ``eval``, of any number of micro-batches; alone: one for the ``step`` of a single micro-batch.

    ``around`` is entered around each piece of work on a micro-batch, whose number it gets.

    The ranks of ``group`` build and call it together. Gradients are sums: they are not divided by ``micro_batches``.
    """
    last = layout.stages - 1
    stages = [
        _Stage(
            part,
            stage,
            layout.stages,
            device,
            input_args=shapes.inputs() if stage == 0 else shapes.hidden(),
            output_args=shapes.logits() if stage == last else shapes.hidden(),
            group=group,
            around=around,
        )
        for part, stage in zip(parts, layout.stages_of(group.rank()), strict=True)
    ]
    schedule: Any = _schedule_class(layout, order)
    single = issubclass(schedule, PipelineScheduleSingle)
    return schedule(stages[0] if single else stages, micro_batches, loss_fn=loss, scale_grads=False)


class _Stage(PipelineStage):
    """A stage that says which micro-batch it works on, and whose first exchange leaves out its own rank.

    Before the first step torch 2.11 exchanges a number with the neighbours, also where the next stage is on the same
    rank (V-shaped schedules): gloo can't send to itself. Later releases have no such exchange, and don't call this.
    """

    def __init__(self, *args: Any, around: Callable[[int], AbstractContextManager[None]], **options: Any) -> None:
        super().__init__(*args, **options)
        self._around = around

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with self._around(fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **options)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with self._around(bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **options)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        with self._around(bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **options)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        exchanges: list[dist.P2POp] = super()._get_init_p2p_neighbors_ops()  # type: ignore[misc]
        return [exchange for exchange in exchanges if exchange.group_peer != self.group_rank]


def _schedule_class(layout: Layout, order: Order) -> Any:
    match order:
        case "step":
            return get_schedule_class(layout.schedule)
        case "alone":
            return _alone(layout)
        case "forward":
            return _forward_only(layout)


def _alone(layout: Layout) -> Any:
    """A schedule for one micro-batch, which goes through all stages and back: the layout's own needs more of them."""
    if layout.stages_per_rank == 1:
        return ScheduleGPipe
    return ScheduleZBVZeroBubble if layout.schedule in V_SCHEDULES else ScheduleLoopedBFS


def _forward_only(layout: Layout) -> Any:
    """A schedule with the same stages on the same ranks, whose forward passes do not wait for backward passes."""
    if layout.stages_per_rank == 1:
        return ScheduleGPipe
    return _ForwardOnlyV if layout.schedule in V_SCHEDULES else ScheduleLoopedBFS


class _ForwardOnlyV(ScheduleZBVZeroBubble):
    """The forward passes of a V-shaped schedule.

    torch's own can't ``eval``: they hand gradients on between the two stages of a rank in any case. So what belongs to
    the backward pass is taken out of the order of work; what is left of it stays matched between the ranks.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # By name, since torch 2.11 has no actions to wait.
        kept = ("FORWARD", "SEND_F", "RECV_F", "WAIT_SEND_F", "UNSHARD", "RESHARD")
        self.pipeline_order_with_comms = {
            rank: [action for action in actions if action.computation_type.name in kept]
            for rank, actions in self.pipeline_order_with_comms.items()
        }
