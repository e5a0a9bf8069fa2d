"""A loss for ``trainer.recipe.loss``: a rank computes slowly from the step on at which its pod's file says so.

The file is ``slow`` in the folder of the pod's run, and holds the rank, and by how many seconds each matrix product of
that process takes longer from then on, whoever asks for it. Results stay what they are. Needs nothing of this
repository: it is copied to where a job looks for its modules.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

KERNELS = torch.library.Library("aten", "IMPL")


class Switch:
    """Throws over once."""

    seconds = 0.0

    def look(self) -> None:
        """Slow from now on, if that was ordered for this rank."""
        order = Path(os.environ["LOCKSTEP_RUN_DIR"], "slow")
        if self.seconds or not order.exists():
            return
        rank, seconds = order.read_text().split()
        if int(rank) == dist.get_rank():
            self.seconds = float(seconds)
            KERNELS.impl("mm", self.product, "CPU")

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, slowly."""
        out = torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass
        return out


SWITCH = Switch()


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, as without this module."""
    SWITCH.look()
    return cross_entropy(logits, targets, reduction="sum")
