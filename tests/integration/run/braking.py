"""A loss that lets training crawl while a file stands beside it: a job trains until something else has happened, and is
not to be over before. Tests copy this module to where their manifest is."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

BRAKE = "brake"
SECONDS = 0.5


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The usual one, a sum over tokens."""
    if Path(__file__).with_name(BRAKE).exists():
        time.sleep(SECONDS)
    return cross_entropy(logits, targets, reduction="sum")
