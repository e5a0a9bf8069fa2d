"""Cross entropy of the next token, with z-loss, over logits that are whole or split along the vocabulary.

torch's ``loss_parallel`` does the same for DTensors, but only inside a context that must enclose the backward pass too,
which the schedules of a pipeline run on their own. Here it is one autograd function on the local logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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
    compiler: str | None = None
    """torch.compile's backend: on a GPU the logits are then read once and their gradient written once, in place of ten
    passes in float32 (a sixth of llama3-1b's step on an H200). None: eager, in pieces."""

    def __call__(self, logits: Tensor, targets: Tensor, denominator: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """logits (…, V or V / ranks), targets (…) int64 → the loss for the backward pass, a scalar in float32 at least,
        and the undivided sums of cross entropy and weighted z-loss, (2,) float64 without gradient.

        Computed in float32 at least; the gradient has the logits' dtype.
        """
        cross_entropy: Tensor
        z_loss: Tensor
        cross_entropy, z_loss = _Sums.apply(logits.flatten(0, -2), targets.flatten(), self)
        sums = torch.stack([cross_entropy, z_loss]).detach()
        loss = (cross_entropy + z_loss) / denominator
        return loss.to(torch.promote_types(logits.dtype, torch.float32)), sums


class _Sums(torch.autograd.Function):
    """Keeps the logits and one number per token; softmaxes are computed again in the backward pass, piece by piece."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, how: Loss) -> tuple[Tensor, Tensor]:
        rows, width = logits.shape
        columns, counted = _columns(targets, width, how.group)
        if how.compiler is not None:
            log_sum, chosen = _compiled(_log_sums, how.compiler)(logits, columns)
        else:
            pieces = [_log_sums(logits[piece], columns[piece]) for piece in _pieces(rows, width)]
            log_sum, chosen = (torch.cat(each) for each in zip(*pieces, strict=True))
        log_sum, chosen = _over_the_vocabulary(log_sum, chosen, how.group)
        ctx.save_for_backward(logits, columns, counted, log_sum)
        ctx.how = how
        log_sums = log_sum.double()
        cross_entropy = (log_sums - chosen.double()).where(counted, 0).sum()
        return cross_entropy, how.z_weight * log_sums.square().where(counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, by_cross_entropy: Tensor, by_z_loss: Tensor) -> tuple[Tensor, None, None]:
        logits, columns, counted, log_sum = ctx.saved_tensors
        how: Loss = ctx.how
        precise = log_sum.dtype
        # d logsumexp / d logits is the softmax: what each token's is multiplied by.
        along_softmax = by_cross_entropy.to(precise) + 2 * how.z_weight * by_z_loss.to(precise) * log_sum
        along_softmax = along_softmax.where(counted, 0)
        at_target = by_cross_entropy.to(precise).neg() * (columns >= 0)
        if how.compiler is not None:
            fused = _compiled(_gradient, how.compiler)(logits, columns, log_sum, along_softmax, at_target)
            return fused, None, None
        gradient = torch.empty_like(logits)
        for piece in _pieces(*logits.shape):
            part = (logits[piece].to(precise) - log_sum[piece, None]).exp_()
            part *= along_softmax[piece, None]
            part.scatter_add_(-1, columns[piece].clamp(min=0)[:, None], at_target[piece, None])
            gradient[piece] = part
        return gradient, None, None


@cache
def _compiled(function: Callable[..., Any], compiler: str) -> Callable[..., Any]:
    return torch.compile(function, backend=compiler, dynamic=False)


def _log_sums(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp of each row in float32 at least, and the logit of its column, 0 where that is −1."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = precise.gather(-1, columns.clamp(min=0)[:, None])[:, 0]
    return precise.logsumexp(-1), picked.where(columns >= 0, 0)


def _gradient(logits: Tensor, columns: Tensor, log_sum: Tensor, along_softmax: Tensor, at_target: Tensor) -> Tensor:
    """The backward pass in one expression, which compiled is one pass over the logits."""
    softmax = (logits.to(log_sum.dtype) - log_sum[:, None]).exp()
    target = columns[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return (softmax * along_softmax[:, None] + torch.where(target, at_target[:, None], 0)).to(logits.dtype)


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
