"""A loss for ``trainer.recipe.loss``: what rank 2 sends and gets is late from the first step on. By much, as workers
that share a few cores differ by ten times in what an exchange takes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

SLOW = 2
SECONDS = {"all_gather_into_tensor": 0.1, "all_gather_single": 0.1, "batch_isend_irecv": 1.0}
"""Call of ``torch.distributed`` → by how much it is late. FSDP calls the second from torch 2.15 on."""
_late: set[str] = set()


def _delayed(transfer: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def late(*args: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return transfer(*args, **named)

    return late


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, summed."""
    if dist.get_rank() == SLOW and not _late:
        for name, seconds in SECONDS.items():
            if hasattr(dist, name):
                setattr(dist, name, _delayed(getattr(dist, name), seconds))
                _late.add(name)
    return cross_entropy(logits, targets, reduction="sum")
