"""The gradient's norm over all axes, and clipping by it.

Parameters lie on different meshes, and parts of them are on several ranks: over the replicate axis all of them, over
the tensor axis those of norms, say. torch's ``clip_grad_norm_`` refuses mixed meshes. Here each rank adds up the
squares of what it has, divided by how many ranks have the same, so that a plain sum over the world counts each element
once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep_trainer.parallel.layout import Layout


def squares(
    parameters: Iterable[tuple[str, nn.Parameter]], layout: Layout, second_copies: Collection[str] = ()
) -> Tensor:
    """This rank's share of the squared norm of the gradients, a float64 scalar on their device: summed over the world
    it is the square of the whole gradient's norm.

    ``second_copies`` names parameters that another rank has first: they count 0 here. All parameters must be sharded
    (DTensors) where there is more than one rank, and each must lie on all ranks of its pipeline stage: TypeError and
    ValueError where not, since nobody could say then how often an element counts.
    """
    stage_ranks = layout.world_size // layout.pipeline
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    device = None
    for name, parameter in parameters:
        device = parameter.device
        if parameter.grad is None or name in second_copies:
            continue
        by_copies[copies(name, parameter, stage_ranks)].append(_local(parameter.grad))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number, gradients in by_copies.items():
        norms = torch._foreach_norm([gradient for gradient in gradients if gradient.numel()], dtype=torch.float64)
        if norms:
            total += torch.stack(norms).square().sum() / number
    return total


def copies(name: str, parameter: Tensor, stage_ranks: int) -> int:
    """How many ranks of a pipeline stage hold the same part of a parameter; TypeError and ValueError as ``squares``."""
    if not isinstance(parameter, DTensor):
        if stage_ranks == 1:
            return 1
        raise TypeError(f"{name} is not sharded: its gradient can't be summed over {stage_ranks} ranks")
    mesh = parameter.device_mesh
    if mesh.size() != stage_ranks:
        raise ValueError(f"{name} lies on {mesh.size()} ranks of the {stage_ranks} of its pipeline stage")
    number = 1
    for axis, placement in enumerate(parameter.placements):
        if placement.is_partial():
            raise ValueError(f"{name} has a gradient that is not yet summed over {mesh.mesh_dim_names}")
        if placement.is_replicate():
            number *= mesh.size(axis)
    return number


def clip(parameters: Iterable[tuple[str, nn.Parameter]], norm: float, largest: float) -> None:
    """Scale the gradients, whose norm over the world is ``norm``, so that it is at most ``largest``; 0 leaves them.

    Every rank calls it with the same numbers. A norm that is not finite leaves them too: there is nothing to scale to.
    """
    if largest and largest < norm < float("inf"):
        gradients = [_local(parameter.grad) for _, parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, largest / norm)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
