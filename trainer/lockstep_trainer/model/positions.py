"""How a decoder knows the order of tokens.

RoPE turns queries and keys (Su et al. 2021), with the scalings of Llama 3 and YaRN; ALiBi lowers scores by distance
(Press et al. 2021); learned and sinusoidal positions are added to the embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lockstep_trainer.model.config import DecoderConfig

# --- RoPE ----------------------------------------------------------------------------------------------------------


def rotation(positions: Tensor, config: DecoderConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, (B or 1, T, 1, E/2) each.

    ``positions`` is (T,) or (B, T). Computed in float64, since positions are large. With YaRN both are larger by its
    attention factor, which so enters queries and keys alike.
    """
    angles = positions[..., None].double() * frequencies(config, positions.device)
    factor = attention_factor(config)
    cos, sin = (angles.cos() * factor).to(dtype)[..., None, :], (angles.sin() * factor).to(dtype)[..., None, :]
    return (cos, sin) if positions.dim() == 2 else (cos[None], sin[None])


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of (B, T, heads, E) by its position's angle."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair, (E/2,) float64, scaled as ``rope_scaling`` says."""
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float64)
    plain = config.rope_theta ** (-half / config.head_dim)
    if config.rope_scaling == "llama3":
        return _llama3(plain, config)
    if config.rope_scaling == "yarn":
        return _yarn(plain, config)
    return plain


def attention_factor(config: DecoderConfig) -> float:
    """By how much YaRN lengthens queries and keys: 0.1 ln(factor) + 1 (Peng et al. 2023, equation 22)."""
    if config.rope_scaling != "yarn" or config.rope_factor <= 1:
        return 1.0
    return 0.1 * math.log(config.rope_factor) + 1


def _llama3(plain: Tensor, config: DecoderConfig) -> Tensor:
    """Slow pairs are stretched by the factor, fast ones left, those between mixed (code of Llama 3.1)."""
    turns = plain * config.rope_original_length / (2 * math.pi)  # within the original length
    low, high = config.rope_low_frequency, config.rope_high_frequency
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / config.rope_factor)


def _yarn(plain: Tensor, config: DecoderConfig) -> Tensor:
    """Pairs that turn less than ``beta_slow`` times within the original length are stretched by the factor, those that
    turn more than ``beta_fast`` times are left, a linear ramp over the pairs lies between (Peng et al. 2023, «NTK by
    parts»; the ends are rounded outwards to whole pairs as in the authors' code)."""

    def pair(turns: float) -> float:
        wavelength = config.rope_original_length / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair(config.rope_beta_fast)), 0)
    high = min(math.ceil(pair(config.rope_beta_slow)), config.head_dim - 1)
    index = torch.arange(len(plain), device=plain.device, dtype=plain.dtype)
    stretched = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - stretched + stretched / config.rope_factor)


# --- ALiBi ---------------------------------------------------------------------------------------------------------


def alibi_slopes(heads: int) -> list[float]:
    """By how much each head's scores fall with each position of distance.

    A power of two of heads: the geometric sequence 2^(−8/heads), 2^(−16/heads), …. Else that of the next lower power of
    two, and then every second one of the next higher (code of Press et al. 2021).
    """
    lower = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    between = [2 ** (-8 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    return slopes + between[: heads - lower]


# --- added to the embedding -------------------------------------------------------------------------------------------


class LearnedPositions(nn.Embedding):
    """A learned vector for each position below ``max_length``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.max_length, config.dim)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (T,) or (B, T) → (1 or B, T, dim)."""
        table = super().forward(positions)
        return table if positions.dim() == 2 else table[None]


class SinusoidalPositions(nn.Module):
    """Sines, then cosines, of geometrically spaced wavelengths from 2π to 20,000π (Vaswani et al. 2017). No weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.dim = config.dim

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (T,) or (B, T) → (1 or B, T, dim), float64."""
        even = torch.arange(0, self.dim, 2, device=positions.device, dtype=torch.float64)
        angles = positions[..., None].double() * 10_000.0 ** (-even / self.dim)
        table = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return table if positions.dim() == 2 else table[None]
