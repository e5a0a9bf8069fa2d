"""Cross entropy of the next token, with z-loss, over logits that are whole or split along the vocabulary.

torch's ``loss_parallel`` does the same for DTensors, but only inside a context that must enclose the backward pass too,
which the schedules of a pipeline run on their own. Here it is one autograd function on the local logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.batch import IGNORE

_CHUNK = 2**25
"""Logits that are at hand in float32 at a time, 128 MiB."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Sum over the tokens of the cross entropy −log softmax(logits)[target] plus ``z_weight`` × logsumexp(logits)²
    (PaLM, Chowdhery et al. 2022), divided by ``denominator``.

    Tokens whose target is IGNORE count nothing. With ``group``, each of its ranks has an equal part of the vocabulary,
    in the order of the ranks, of the same tokens; all of them get the same loss.
    """

    z_weight: float = 0.0
    group: dist.ProcessGroup | None = None

    def __call__(self, logits: Tensor, targets: Tensor, denominator: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """logits (…, V or V / ranks), targets (…) int64 → the loss for the backward pass, a scalar in float32 at least,
        and the undivided sums of cross entropy and weighted z-loss, (2,) float64 without gradient.

        Computed in float32 at least; the gradient has the logits' dtype.
        """
        cross_entropy: Tensor
        z_loss: Tensor
        cross_entropy, z_loss = _Sums.apply(logits.flatten(0, -2), targets.flatten(), self.z_weight, self.group)
        sums = torch.stack([cross_entropy, z_loss]).detach()
        loss = (cross_entropy + z_loss) / denominator
        return loss.to(torch.promote_types(logits.dtype, torch.float32)), sums


class _Sums(torch.autograd.Function):
    """Keeps the logits and one number per token; softmaxes are computed again in the backward pass, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, z_weight: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        rows, width = logits.shape
        precise = torch.promote_types(logits.dtype, torch.float32)
        columns, counted = _columns(targets, width, group)
        log_sum = torch.empty(rows, dtype=precise, device=logits.device)
        chosen = torch.zeros(rows, dtype=precise, device=logits.device)
        for piece in _pieces(rows, width):
            part = logits[piece].to(precise)
            log_sum[piece] = part.logsumexp(-1)
            own = columns[piece] >= 0
            picked = part.gather(-1, columns[piece].clamp(min=0)[:, None])[:, 0]
            chosen[piece] = picked.where(own, 0)
        log_sum, chosen = _over_the_vocabulary(log_sum, chosen, group)
        ctx.save_for_backward(logits, columns, counted, log_sum)
        ctx.z_weight = z_weight
        log_sums = log_sum.double()
        cross_entropy = (log_sums - chosen.double()).where(counted, 0).sum()
        return cross_entropy, z_weight * log_sums.square().where(counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, by_cross_entropy: Tensor, by_z_loss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, columns, counted, log_sum = ctx.saved_tensors
        precise = log_sum.dtype
        # d logsumexp / d logits is the softmax: what each token's is multiplied by.
        along_softmax = by_cross_entropy.to(precise) + 2 * ctx.z_weight * by_z_loss.to(precise) * log_sum
        along_softmax = along_softmax.where(counted, 0)
        at_target = by_cross_entropy.to(precise).neg() * (columns >= 0)
        gradient = torch.empty_like(logits)
        for piece in _pieces(*logits.shape):
            part = (logits[piece].to(precise) - log_sum[piece, None]).exp_()
            part *= along_softmax[piece, None]
            part.scatter_add_(-1, columns[piece].clamp(min=0)[:, None], at_target[piece, None])
            gradient[piece] = part
        return gradient, None, None, None


def _columns(targets: Tensor, width: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Each token's target among this rank's columns, −1 where it is on another rank or there is none; and whether it
    has one at all."""
    counted = targets != IGNORE
    columns = targets - (group.rank() * width if group is not None else 0)
    return columns.where(counted & (columns >= 0) & (columns < width), -1), counted


def _over_the_vocabulary(log_sum: Tensor, chosen: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """log Σ exp and the target's logit over all parts of the vocabulary: the same bits on all ranks."""
    if group is None or group.size() == 1:
        return log_sum, chosen
    own = torch.stack([log_sum, chosen])
    gathered = own.new_empty(2 * group.size(), own.shape[1])
    dist.all_gather_into_tensor(gathered, own, group=group)
    parts = gathered.view(-1, *own.shape)
    return parts[:, 0].logsumexp(0), parts[:, 1].sum(0)


def _pieces(rows: int, width: int) -> list[slice]:
    size = max(1, _CHUNK // width)
    return [slice(start, start + size) for start in range(0, rows, size)]
