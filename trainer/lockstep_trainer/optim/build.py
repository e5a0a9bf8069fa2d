"""The optimizer that a recipe names, over the parameters of one rank, with its state allocated.

Your own optimizer
------------------
``optimizer.module: package.module:function`` names a function::

    def build(named_parameters: list[tuple[str, nn.Parameter]], spec: OptimizerSpec) -> torch.optim.Optimizer

It gets one rank's parameters with their names in the model, and the fields of ``trainer.recipe.optimizer``. Parameters
are float32 DTensors, sharded as the layout has it; gradients are sharded alike, summed and clipped when ``step()`` is
called, on all ranks. ``lr`` of each group is set before each step, times the group's ``lr_scale`` where it has one.
What ``step()`` keeps must lie in ``optimizer.state[parameter]``, as torch's own optimizers have it, and be DTensors of
the parameter's layout where it has a value per element (``torch.zeros_like(parameter)`` is one): then checkpoints hold
it, and load it at any other layout.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.errors import UserError
from lockstep_trainer.modules import call, load_callable
from lockstep_trainer.optim.adamw import Pairs, adamw
from lockstep_trainer.optim.muon import muon

_FIELD = "trainer.recipe.optimizer.module"


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimizer of ``spec`` over one rank's parameters, of all its parts of the model.

    Its state is allocated, so that a checkpoint can be loaded into it; ``start_fresh`` where there is none to load.
    Raises UserError where the user's own function is missing or returns something else.
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if spec.module is not None:
        return _own(named, spec, spec.module)
    return muon(named, spec) if spec.name == "muon" else adamw(named, spec)


def start_fresh(optimizer: torch.optim.Optimizer) -> None:
    """Forget what allocating the state left in a user's own optimizer: its first step makes it anew."""
    if getattr(optimizer, "_allocated_by_a_step", False):
        optimizer.state.clear()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step; a group with ``lr_scale`` gets so many times it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _own(named: Pairs, spec: OptimizerSpec, reference: str) -> torch.optim.Optimizer:
    optimizer = call(load_callable(reference, _FIELD), _FIELD, named, spec)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"{_FIELD}: {reference} returned a {type(optimizer).__name__}; return a torch.optim.Optimizer")
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    left = [name for name, parameter in named if parameter not in held]
    if left:
        raise UserError(
            f"{_FIELD}: the optimizer of {reference} leaves out {left[0]} ({len(left)} of {len(named)} parameters); "
            "give it all of them, and set requires_grad to False on those that shall stay"
        )
    if not optimizer.state:
        _allocate(optimizer, named)
    return optimizer


def _allocate(optimizer: torch.optim.Optimizer, named: Pairs) -> None:
    """Let an optimizer make its state by a step with a learning rate of 0 and gradients of 0. Parameters have no values
    yet, and get them afterwards."""
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.0)
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer._allocated_by_a_step = True  # type: ignore[attr-defined]
