"""What a step is computed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Target of a token that has no loss."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole sequences of one data-parallel rank, in order; each field is (samples, tokens), int64."""

    inputs: Tensor
    targets: Tensor  # IGNORE where there is no loss
    positions: Tensor | None = None  # of each token in its document; with documents, or neither
    documents: Tensor | None = None  # number of each token's document in the sample

    @property
    def tokens(self) -> Tensor:
        """Number of tokens with a target: an int64 scalar on the batch's device."""
        return (self.targets != IGNORE).sum()

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``; copies run beside the device's work."""

        def move(field: Tensor | None) -> Tensor | None:
            return None if field is None else field.to(device, non_blocking=True)

        return Batch(
            self.inputs.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            move(self.positions),
            move(self.documents),
        )
