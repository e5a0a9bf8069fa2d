"""The dense feed-forward part of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from lockstep_trainer.model.config import Activation, DecoderConfig

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "reglu": F.relu,
    "geglu": F.gelu,
    "gelu": F.gelu,  # with the error function, not the tanh that approximates it
    "relu": F.relu,
}
"""What the gate goes through where there is one (Shazeer 2020), else the up projection."""


class FeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate; no biases. ``width`` is the size inside."""

    def __init__(self, config: DecoderConfig, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, width, bias=False) if config.gated else None
        self.up = nn.Linear(config.dim, width, bias=False)
        self.down = nn.Linear(width, config.dim, bias=False)
        self._activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim)."""
        up = self.up(x)
        inside = self._activation(up) if self.gate is None else self._activation(self.gate(x)) * up
        y: Tensor = self.down(inside)
        return y
