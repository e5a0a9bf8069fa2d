"""A loss that fails once like a GPU whose memory is broken, when a file stands beside it, and crawls while another one
does: what follows is seen before the job is over. Tests copy this module to where their manifest is."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

FAULT, BRAKE = "fault", "brake"
SECONDS = 0.5


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The usual one, a sum over tokens."""
    here = Path(__file__)
    if here.with_name(FAULT).exists():
        here.with_name(FAULT).unlink()
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    if here.with_name(BRAKE).exists():
        time.sleep(SECONDS)
    return cross_entropy(logits, targets, reduction="sum")
