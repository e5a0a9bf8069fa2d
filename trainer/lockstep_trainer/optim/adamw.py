"""AdamW (Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2019), and which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as torch_adamw

from lockstep_api.v1alpha1 import OptimizerSpec

Pairs = Sequence[tuple[str, nn.Parameter]]


def adamw(named: Pairs, spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW over ``named``, with its state allocated, so that a checkpoint can be loaded into it."""
    optimizer = torch.optim.AdamW(
        decay_groups(named, spec),
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        fused=True,  # one kernel for all parameters, on CPU too
    )
    for _, parameter in named:
        optimizer.state[parameter] = adamw_state(parameter)
    return optimizer


def adamw_state(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """State of AdamW before the first step, under torch's names."""
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


def adamw_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Those of its groups that ``adamw_update`` updates; none of most users' own optimizers."""
    if type(optimizer) is not torch.optim.AdamW:
        return [group for group in optimizer.param_groups if group.get("muon") is False]
    return [group for group in optimizer.param_groups if group["fused"] and not group["amsgrad"] | group["maximize"]]


def adamw_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    *,
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    """AdamW's update by the settings of ``group``, in place, by element: on local shards, or any part of them."""
    beta1, beta2 = group["betas"]
    torch_adamw(
        parameters, gradients, first, second, [], steps,
        fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
        eps=group["eps"], maximize=False,
    )  # fmt: skip


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of the gradient, cut as the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        return gradient.redistribute(placements=parameter.placements).to_local()
    return gradient


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], spec: OptimizerSpec) -> list[dict[str, Any]]:
    """The parameters in two groups: those that decay, and those that do not; an empty one is left out.

    Vectors never decay: gains of norms and biases have no scale to lose. ``no_decay`` adds patterns of names.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        (decayed if parameter.ndim >= 2 and not matches(name, spec.no_decay) else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether ``name`` is of one of these patterns (``*`` and ``?``, over the whole name)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
