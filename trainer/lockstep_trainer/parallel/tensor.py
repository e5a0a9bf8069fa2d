"""Tensor parallelism with sequence and loss parallelism.

The large matrices are split over the tensor axis (Shoeybi et al. 2019): by output features before a nonlinearity, by
input features behind it, heads staying whole. Between them the residual stream is split along the sequence (Korthikanti
et al. 2022), so that norms, too, do no work twice; what blocks and parts hand each other is the local piece, a plain
tensor (B, T / tensor, dim). Token ids and positions are whole on every rank. The head leaves each rank its part of the
vocabulary's logits, (B, T, V / tensor), which ``lockstep_trainer.loss`` takes as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from lockstep_trainer.model.decoder import Block, Decoder, TiedHead
from lockstep_trainer.model.feedforward import FeedForward
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes


def apply_tensor(part: Decoder, layout: Layout, meshes: Meshes) -> None:
    """Split the matrices of ``part`` over the tensor axis. Mixture layers are left to ``expert.apply_experts``, but for
    their norm, which gives them the tokens of this rank."""
    if layout.tensor == 1:
        return
    part.pieces = layout.tensor
    # What the embedding gives may still be under way; ``compile_blocks`` says why compiled blocks must wait for it.
    plan: dict[str, ParallelStyle] = {"embedding": _embedding(), "position": _Positions(), "norm": SequenceParallel()}
    plan["head"] = _TiedHead() if isinstance(part.head, TiedHead) else _head()
    present = {name: style for name, style in plan.items() if getattr(part, name) is not None}
    if not part.part.first:  # the tied head's copy, which embeds nothing
        present.pop("position", None)
    parallelize_module(part, meshes.tensor, present)
    for block in part.blocks.values():
        assert isinstance(block, Block)
        parallelize_module(block, meshes.tensor, _block_plan(block))
        block.attention.first_head = meshes.at.tensor * (part.config.heads // layout.tensor)


def _block_plan(block: Block) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        # Gathered once for the three projections.
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(output_layouts=Shard(1)),
    }
    if block.attention.query_norm is not None:
        # Each rank has its heads, and all have the same weight: the same as a sequence of heads.
        plan["attention.query_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        plan["attention.key_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    if isinstance(block.ffn, FeedForward):
        plan["ffn_norm"] = SequenceParallel()
        plan.update({f"ffn.{name}": style for name, style in feedforward_plan(block.ffn).items() if name})
        plan["ffn"] = feedforward_plan(block.ffn)[""]
    else:
        plan["ffn_norm"] = SequenceParallel(use_local_output=True)
    return plan


def feedforward_plan(module: FeedForward) -> dict[str, ParallelStyle]:
    """The plan of a dense feed-forward part whose input and output are split along the sequence; "" is itself."""
    plan: dict[str, ParallelStyle] = {
        "": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for name, _ in module.named_children():
        if name != "down":
            plan[name] = ColwiseParallel()
    return plan


def _embedding() -> ParallelStyle:
    """Each rank has a part of the vocabulary's rows; the sum over the ranks leaves each its piece of the sequence."""
    return RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))


def _head() -> ParallelStyle:
    return ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=True)


class _Positions(ParallelStyle):
    """What is added to the embedding, for this rank's piece of the sequence only."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = DTensor.from_local(parameter, device_mesh, [Replicate()], run_check=False)
            module.register_parameter(name, nn.Parameter(whole))
        pieces, own = device_mesh.size(), device_mesh.get_local_rank()

        def cut(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (positions,) = inputs
            piece = positions.chunk(pieces, dim=-1)[own]
            if next(module.parameters(), None) is None:
                return (piece,)
            return (DTensor.from_local(piece, device_mesh, [Shard(piece.dim() - 1)], run_check=False),)

        module.register_forward_pre_hook(cut)
        module.register_forward_hook(_to_local)
        return module


class _TiedHead(PrepareModuleInput):
    """The head that uses the embedding's rows, of which each rank has a part."""

    def __init__(self) -> None:
        super().__init__(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(_to_local)
        return module


def _to_local(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.to_local() if isinstance(output, DTensor) else output
