"""AdamW with decoupled weight decay on matrices only, and the gradient's norm over all shards."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep_api.v1alpha1 import OptimizerSpec


def build_optimizer(model: nn.Module, spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW over the model's parameters with its state allocated, so that a checkpoint can be loaded into it."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "embedding" not in name else plain).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        fused=True,  # one kernel for all parameters, on CPU too
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


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
