"""The same training in one process: plain modules, plain loss, nothing split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lockstep_trainer.batch import IGNORE
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.moe import MoE
from lockstep_trainer.optim.build import build_optimizer
from parity.cases import STEPS, Case
from parity.problem import LARGEST_NORM, SPEC, Z_WEIGHT, global_batch, weight


@dataclass(frozen=True, slots=True)
class Reference:
    """What every layout must give."""

    losses: list[float]  # of each step
    norms: list[float]
    gradients: dict[str, Tensor]  # of the first step, before clipping
    parameters: dict[str, Tensor]  # after the last step
    buffers: dict[str, Tensor]  # the persistent ones


def key(case: Case) -> str:
    """Cases with the same key have the same reference."""
    return f"{case.model}-{case.optimizer}-{'documents' if case.documents else 'plain'}"


def compute(case: Case, path: Path) -> None:
    """Train in float64 and write the Reference to ``path``."""
    torch.set_default_dtype(torch.float64)
    config = case.config
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, parameter.shape))
    optimizer = build_optimizer(model.named_parameters(), SPEC.model_copy(update={"name": case.optimizer}))
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = global_batch(step, config, documents=case.documents)
        logits = model(batch.inputs, batch.positions, batch.documents)
        has_target = batch.targets != IGNORE
        log_sum = logits.logsumexp(-1)
        chosen = logits.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
        loss = ((log_sum - chosen + Z_WEIGHT * log_sum**2) * has_target).sum() / has_target.sum()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        losses.append(float(loss.detach()))
        norms.append(norm)
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        for parameter in model.parameters():
            if parameter.grad is not None and norm > LARGEST_NORM:
                parameter.grad *= LARGEST_NORM / norm
        optimizer.step()
        optimizer.zero_grad()
        _balance(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b for name, b in model.state_dict().items() if name not in parameters}
    torch.save(Reference(losses, norms, gradients, parameters, buffers), path)


def _balance(model: Decoder) -> None:
    for module in model.modules():
        if isinstance(module, MoE):
            counts = module.expert_tokens
            assert module.router_bias is not None
            module.router_bias += module.balance_rate * torch.sign(counts.double().mean() - counts)
            counts.zero_()
