"""The optimizer that a recipe names, over the parameters of one rank, with its state allocated."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.optim.adamw import adamw


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimizer of ``spec`` over one rank's parameters, of all its parts of the model."""
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    return adamw(named, spec)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step; a group with ``lr_scale`` gets so many times it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
