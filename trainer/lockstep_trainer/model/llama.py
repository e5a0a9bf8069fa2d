"""A decoder in the style of Llama: RMSNorm before each part, rotary positions, grouped queries, SwiGLU.

Shapes in comments: B samples, T positions, D model width, H query heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes of a decoder. Names follow the papers; ``vocab_size`` comes from the tokenizer."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023) and rotary positions (Su et al. 2021)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.query = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.output = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)
        norm = config.qk_norm
        self.query_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if norm else nn.Identity()
        self.key_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape  # B, T, D
        query = self.query(x).view(batch, length, self.heads, self.head_dim)
        key = self.key(x).view(batch, length, self.kv_heads, self.head_dim)
        value = self.value(x).view(batch, length, self.kv_heads, self.head_dim)
        query = rotate(self.query_norm(query), rope).transpose(1, 2)  # B, H, T, E
        key = rotate(self.key_norm(key), rope).transpose(1, 2)  # B, K, T, E
        mixed = F.scaled_dot_product_attention(
            query, key, value.transpose(1, 2), is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        y: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
        return y


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        y: Tensor = x + self.ffn(self.ffn_norm(x))
        return y


class Llama(nn.Module):
    """The decoder: token ids (B, T) to logits (B, T, vocabulary)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        rope = rotation(tokens.shape[1], self.config.head_dim, self.config.rope_theta, x.device, x.dtype)
        for block in self.blocks:
            x = block(x, rope)
        x = self.norm(x)
        logits: Tensor = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        return logits


def rotation(
    length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, (T, 1, E/2) each; computed in float64, since positions are large."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequency
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of (B, T, heads, E) by its position's angle."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def initial_weight(name: str, shape: torch.Size, config: LlamaConfig, seed: int, device: torch.device) -> Tensor:
    """The fresh value of one parameter, float32: a function of its name and the seed, whatever the layout.

    Norms begin at 1. Matrices are normal with deviation 0.02, those that write to the residual stream with
    0.02 / √(2 × layers), so that the stream's size does not grow with depth (Radford et al. 2019).
    """
    if len(shape) < 2:
        return torch.ones(shape, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    writes_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
    deviation = 0.02 / math.sqrt(2 * config.layers) if writes_residual else 0.02
    return torch.empty(shape, device=device).normal_(0.0, deviation, generator=generator)
