"""A loss that takes its time: it sets how long a step lasts, so that the job is as long as the soak, and leaves the
machine's cores to what is measured. Runs in the pods."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (N, V), targets (N,) → cross entropy, summed over the tokens."""
    from torch.nn import functional

    time.sleep(float(os.environ["SOAK_STEP_SECONDS"]))
    return functional.cross_entropy(logits, targets, reduction="sum")
