"""A loss that takes its time: it sets how long a step lasts, so that the job is as long as the soak, and leaves the
machine's cores to what is measured. Runs in the pods, which find the length beside this file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH = Path(__file__).with_name("seconds")


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (N, V), targets (N,) → cross entropy, summed over the tokens."""
    from torch.nn import functional

    time.sleep(float(_LENGTH.read_text()))  # read each time: at the end of the faults there is no pace any more
    return functional.cross_entropy(logits, targets, reduction="sum")
