"""Fresh weights."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from lockstep_trainer.model.config import DecoderConfig


def initial_weight(name: str, shape: torch.Size, config: DecoderConfig, seed: int, device: torch.device) -> Tensor:
    """The fresh value of one parameter, float32: a function of its name and the seed, whatever the layout.

    Norms begin at 1, biases at 0. Matrices are normal with deviation 0.02, those that write to the residual stream with
    0.02 / √(2 × layers), so that the stream's size does not grow with depth (Radford et al. 2019).
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if len(shape) < 2:
        return torch.ones(shape, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    writes_residual = name.endswith(("attention.output.weight", "down.weight", "experts.down"))
    deviation = 0.02 / math.sqrt(2 * config.layers) if writes_residual else 0.02
    return torch.empty(shape, device=device).normal_(0.0, deviation, generator=generator)
