"""A loss that can be told to fail: runs in the pods, in the main thread of each worker that computes the loss.

A file in the pod's run folder is the order; the first worker that sees it takes it away and obeys.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ORDER = "/lockstep/run/harmful-order"
PACE = "HARMFUL_PACE"
"""Environment variable: seconds that each call takes longer than it needs."""
RAISE, EAT = "raise", "eat"
MESSAGE = "told to fail by the fault matrix"
_PIECE = 64 << 20


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (N, V), targets (N,) → cross entropy, summed over the tokens."""
    from torch.nn import functional

    time.sleep(float(os.environ.get(PACE, "0")))
    order = _order()
    if order == RAISE:
        raise RuntimeError(MESSAGE)
    if order == EAT:  # until the kernel ends it: the container has a limit
        eaten = []
        while True:
            eaten.append(b"\1" * _PIECE)
    return functional.cross_entropy(logits, targets, reduction="sum")


def _order() -> str:
    mine = f"{ORDER}.{os.getpid()}"
    try:
        os.rename(ORDER, mine)
    except FileNotFoundError:
        return ""
    with open(mine) as file:
        order = file.read().strip()
    os.unlink(mine)
    return order
