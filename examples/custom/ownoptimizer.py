"""Lion (Chen et al. 2023): steps of one size in the direction of the momentum's sign."""

import torch
from torch import nn


class Lion(torch.optim.Optimizer):
    """What it keeps is in ``state[parameter]`` and shaped like the parameter: checkpoints hold it at any layout."""

    def __init__(self, parameters, lr: float, beta1: float, beta2: float, weight_decay: float) -> None:
        defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, gradient = state["momentum"], parameter.grad
                update = (momentum * group["beta1"] + gradient * (1 - group["beta1"])).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * group["lr"])
                momentum.mul_(group["beta2"]).add_(gradient * (1 - group["beta2"]))


def build(named_parameters: list[tuple[str, nn.Parameter]], spec) -> torch.optim.Optimizer:
    """What `recipe.optimizer.module: ownoptimizer:build` names; ``spec`` is `recipe.optimizer`."""
    parameters = [parameter for _, parameter in named_parameters]
    return Lion(parameters, spec.lr, spec.beta1, spec.beta2, spec.weight_decay)
