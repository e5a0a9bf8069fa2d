"""Muon for matrices, AdamW for the rest.

Muon (Jordan et al.: Muon: An optimizer for hidden layers in neural networks, 2024) replaces the momentum of a matrix by
the nearest orthogonal one. Its update is scaled to the size of AdamW's, 0.2 · √max(rows, columns) (Liu et al.: Muon is
Scalable for LLM Training, 2025), so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.optim.adamw import Pairs, adamw_state, adamw_update, decay_groups, local_gradient, matches
from lockstep_trainer.optim.spread import Way, on_whole, way_of

# The quintic iteration's coefficients of Jordan et al.: steepest at zero, not exact at one.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7

NOT_HIDDEN = ("*embed*", "*position*", "head.*", "*lm_head*", "*router*")
"""Names of matrices that AdamW updates: their rows are looked up or compared one by one."""

EXCHANGED_BYTES = 2**28
"""Bytes of a rank's shards that are exchanged at once."""


def muon(named: Pairs, spec: OptimizerSpec, *, dtype: torch.dtype | None = None) -> Muon:
    """Muon over ``named``, with its state allocated. ``dtype``: see ``Muon``."""
    hidden = [(name, p) for name, p in named if is_hidden_matrix(name, p)]
    others = [(name, p) for name, p in named if not is_hidden_matrix(name, p)]
    groups = [{**group, "muon": True} for group in decay_groups(hidden, spec)]
    groups += [{**group, "muon": False} for group in decay_groups(others, spec)]
    return Muon(groups, spec, dtype=dtype)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates this parameter: a matrix within a layer, or a stack of them, as experts have."""
    return parameter.ndim in (2, 3) and not name.endswith("bias") and not matches(name, NOT_HIDDEN)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About UVᵀ of each UΣVᵀ, (matrices, rows, columns) → the same: five steps of the quintic Newton–Schulz iteration.

    Singular values end between 0.7 and 1.2 or so (Jordan et al. 2024), which is enough.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Groups with ``muon`` True get Muon, the others AdamW.

    Parameters may be sharded in any way; the update is that of the whole matrices. State has torch's names:
    ``momentum_buffer``, and AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], spec: OptimizerSpec, *, dtype: torch.dtype | None = None) -> None:
        """``dtype``: of the orthogonalisation; None: bfloat16 for float32 parameters on GPUs (as published), else the
        parameters' own."""
        super().__init__(
            groups,
            {
                "lr": spec.lr,
                "momentum": spec.momentum,
                "betas": (spec.beta1, spec.beta2),
                "eps": spec.eps,
                "weight_decay": spec.weight_decay,
            },
        )
        self._dtype = dtype
        self._ways: dict[nn.Parameter, Way] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["muon"]:
                    self._ways[parameter] = way_of(parameter)
                    self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
                else:
                    self.state[parameter] = adamw_state(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient; all ranks call it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for bucket in _buckets(parameters):
                    self._step_matrices(bucket, group)
            elif parameters:
                self._step_others(parameters, group)
        return loss

    def _step_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        gradients = [local_gradient(p) for p in parameters]
        averages = [_local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = list(torch._foreach_lerp(gradients, averages, momentum))  # Nesterov's
        updates = [update.to(self._work_dtype(update)) for update in updates]
        updates = on_whole(updates, [self._ways[p] for p in parameters], orthogonalize)
        torch._foreach_mul_([_local(p) for p in parameters], 1 - lr * group["weight_decay"])
        for parameter, update in zip(parameters, updates, strict=True):
            _local(parameter).add_(update, alpha=-lr * 0.2 * math.sqrt(max(parameter.shape[-2:])))

    def _step_others(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        state = [self.state[p] for p in parameters]
        adamw_update(
            [_local(p) for p in parameters],
            [local_gradient(p) for p in parameters],
            [_local(each["exp_avg"]) for each in state],
            [_local(each["exp_avg_sq"]) for each in state],
            steps=[each["step"] for each in state],
            group=group,
        )

    def _work_dtype(self, update: Tensor) -> torch.dtype:
        if self._dtype is not None:
            return self._dtype
        return torch.bfloat16 if update.is_cuda and update.dtype is torch.float32 else update.dtype


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in runs whose shards are small enough to be exchanged at once: the same runs on all ranks, since
    they go by the shard that the first rank has, the largest one."""
    buckets: list[list[nn.Parameter]] = []
    size = EXCHANGED_BYTES
    for parameter in parameters:
        largest = parameter.numel() * parameter.element_size()
        if isinstance(parameter, DTensor):
            for axis, placement in enumerate(parameter.placements):
                largest //= 1 if placement.is_replicate() else parameter.device_mesh.size(axis)
        if size + largest > EXCHANGED_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += largest
    return buckets


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
