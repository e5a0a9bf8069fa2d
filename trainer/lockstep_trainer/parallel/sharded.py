"""Sharded data parallelism with ``fully_shard`` (FSDP; with copies of the shards, HSDP).

Each block is gathered when it runs and given back afterwards; what is outside the blocks (embedding, last norm, head)
belongs to the root. The experts of a layer are a unit of their own on their own mesh.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes

# A split head's logits are a view. Nothing changes them in place, which is what torch warns of.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


def shard_part(part: Decoder, layout: Layout, meshes: Meshes, policy: MixedPrecisionPolicy) -> None:
    """Shard all parameters of ``part``, which may be on the meta device.

    With a pipeline, parameters stay gathered from the first micro-batch's forward to the last one's backward: to gather
    them for each micro-batch again would cost more than it saves, and schedules that compute the gradients of weights
    apart would miss the parameters that were in the graph (see docs/design/trainer.md).
    """
    reshard = layout.pipeline == 1
    blocks = list(part.blocks.values())
    for block in blocks:
        experts = getattr(block.ffn, "experts", None)
        if isinstance(experts, nn.Module):
            shard_experts(experts, meshes, policy, reshard_after_forward=reshard)
        # The backward pass begins with the last block: to give it back would be for nothing.
        fully_shard(
            block, mesh=meshes.fsdp, mp_policy=policy, reshard_after_forward=reshard and block is not blocks[-1]
        )
    fully_shard(part, mesh=meshes.fsdp, mp_policy=policy, reshard_after_forward=False)
    sum_gradients(part)


def shard_experts(
    experts: nn.Module, meshes: Meshes, policy: MixedPrecisionPolicy, *, reshard_after_forward: bool
) -> None:
    """Shard the weights of this rank's experts over the ranks that share them."""
    ranks = meshes.layout.expert_shard

    def placement(parameter: nn.Parameter) -> Shard:
        """Whole experts where they divide among the ranks, else the first other dimension that does."""
        dividing = [dim for dim, size in enumerate(local_shard(parameter).shape) if size % ranks == 0]
        return Shard(dividing[0] if dividing else 0)

    fully_shard(
        experts,
        mesh=meshes.expert_fsdp,
        mp_policy=policy,
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=placement,
    )
    sum_gradients(experts)


def sum_gradients(module: nn.Module) -> None:
    """Let gradients be summed over the ranks, not averaged: the loss is divided by the global number of tokens."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo can't scale within a sum


def gathered_parameters(part: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What FSDP computes with in place of ``part``'s shards, by the parameters' names: it keeps these objects, so that
    hooks on them stay, while hooks on shards are never called. All ranks call it, between steps: each parameter is
    gathered once. A parameter that FSDP has not is left out."""
    found = []
    for prefix, module in part.named_modules():
        unit: Any = module  # FSDP makes it a subclass of both, which no type says
        if not isinstance(module, FSDPModule):
            continue
        shards = dict(unit.named_parameters())
        unit.unshard()
        for name, parameter in unit.named_parameters():
            if parameter is not shards[name]:
                found.append((f"{prefix}.{name}" if prefix else name, parameter))
        unit.reshard()
    return found


def own_shard(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that this rank holds of the sharded ``like``, a view; no communication.

    FSDP shards what tensor and expert parallelism left, and its axes stand before theirs in the mesh: so the axes are
    gone through from the last one.
    """
    if not isinstance(like, DTensor):
        return whole
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None
    for axis in reversed(range(like.device_mesh.ndim)):
        placement = like.placements[axis]
        if placement.is_replicate():
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]  # Shard, or torch's private _StridedShard
        size = -(-whole.shape[dim] // like.device_mesh.size(axis))  # as torch.chunk does it
        start = min(coordinate[axis] * size, whole.shape[dim])
        whole = whole.narrow(dim, start, min(size, whole.shape[dim] - start))
    return whole


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """bf16: forward and backward in bfloat16, gradients summed in float32, parameters float32. fp32: all as it is."""
    if precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
