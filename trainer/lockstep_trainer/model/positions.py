"""How a decoder knows the order of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep_trainer.model.config import DecoderConfig


def rotation(positions: Tensor, config: DecoderConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, (B or 1, T, 1, E/2) each (Su et al. 2021).

    ``positions`` is (T,) or (B, T). Computed in float64, since positions are large.
    """
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float64)
    frequency = config.rope_theta ** (-half / config.head_dim)
    angles = positions[..., None].double() * frequency
    cos, sin = angles.cos().to(dtype)[..., None, :], angles.sin().to(dtype)[..., None, :]
    return (cos, sin) if positions.dim() == 2 else (cos[None], sin[None])


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of (B, T, heads, E) by its position's angle."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
