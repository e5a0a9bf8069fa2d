"""The gradient's norm over plain sharded data parallelism, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Sum of the squares of this rank's gradient shards: a float64 scalar on the parameters' device.

    Summed over the ranks of one replica and rooted, it is the norm of the whole gradient: every element belongs to
    exactly one of them.
    """
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.double() for norm in norms]).square().sum()


def scale_gradients(parameters: Iterable[nn.Parameter], norm: float, largest: float) -> None:
    """Scale the gradients so that their norm, now ``norm``, is at most ``largest``; 0 leaves them alone."""
    if largest and norm > largest:
        torch._foreach_mul_([_local(p.grad) for p in parameters if p.grad is not None], largest / norm)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
