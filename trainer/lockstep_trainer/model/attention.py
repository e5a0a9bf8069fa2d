"""Attention: which tokens see which, and the layer.

Shapes in comments: B samples, T positions at hand, S positions that are seen, H query heads, K key-value heads, E width
of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.norms import build_norm
from lockstep_trainer.model.positions import alibi_slopes, rotate

Rope = tuple[Tensor, Tensor]


class Places(nn.Module):
    """Where the tokens at hand stand in their sequence, and which of them sees which.

    This one has the whole sequence at hand, in order. Context parallelism puts another in its place.
    """

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Positions of the ``length`` tokens at hand, (T,)."""
        return torch.arange(length, device=device)

    def pairs(self, positions: Tensor, documents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions and documents of the queries, then of the keys, as the core of attention sees them."""
        return positions, documents, positions, documents

    def mask(self, positions: Tensor | None, documents: Tensor | None, window: int) -> Tensor | None:
        """Which key a query sees, True where it does, (B or 1, 1, T, S). None where it is just the causal order."""
        if documents is None and not window:
            return None
        assert positions is not None
        seen, _ = self._seen(positions, documents, window)
        if documents is None and seen.shape[-1] <= window:
            return None  # the window is longer than the sequence
        return seen[:, None]

    def distances(self, positions: Tensor, documents: Tensor | None, window: int) -> Tensor:
        """The same for ALiBi: minus the distance where a query sees a key, −∞ where not, (B or 1, 1, T, S) float32."""
        seen, distance = self._seen(positions, documents, window)
        return torch.where(seen, -distance.float(), -torch.inf)[:, None]

    def _seen(self, positions: Tensor, documents: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
        """Whether a query sees a key, and how far apart they are, (B or 1, T, S) each."""
        if documents is None:
            documents = torch.zeros_like(positions)
        q_at, q_doc, k_at, k_doc = self.pairs(positions, documents)
        distance = q_at[..., :, None] - k_at[..., None, :]
        seen = (distance >= 0) & (q_doc[..., :, None] == k_doc[..., None, :])
        if window:
            seen &= distance < window
        return (seen, distance) if seen.dim() == 3 else (seen[None], distance[None])


class Core(nn.Module):
    """softmax(QKᵀ/√E)V. Context parallelism puts another one in its place."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query (B, H, T, E), key and value (B, K, T, E) → (B, H, T, E).

        ``mask`` is as ``Places`` made it; with ALiBi (B or 1, H, T, S), what is added to the scores.
        """
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023).

    The number of heads is read off the projections' outputs: tensor parallelism leaves each rank a part of them.

    ALiBi gives each head its own slope. Who splits the heads says which ones the core gets: ``first_head`` is the
    number of the first, ``core_heads`` how many they are (None: as many as the query projection gives).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        bias = config.attention_bias
        self.query = nn.Linear(config.dim, config.heads * config.head_dim, bias=bias)
        self.key = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=bias)
        self.value = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=bias)
        self.output = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)
        self.query_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.key_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.core = Core()
        self.first_head = 0
        self.core_heads: int | None = None
        self._slopes = alibi_slopes(config.heads) if config.positions == "alibi" else None

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None) -> Tensor:
        """(B, T, dim) → (B, T, dim). ``mask`` is ``Places.mask``, with ALiBi ``Places.distances``."""
        query, key, value = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        if self._slopes is not None:
            assert mask is not None
            mask = self._bias(mask, query.shape[2], query.dtype)
        mixed = self.core(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
        y: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return y

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (-1, self.head_dim))  # B, T, heads, E

    def _bias(self, distances: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """What ALiBi adds to the scores, (B or 1, heads of the core, T, S)."""
        assert self._slopes is not None
        precise = torch.promote_types(dtype, torch.float32)  # bfloat16 can't tell 256 positions from 257
        own = self._slopes[self.first_head : self.first_head + (self.core_heads or heads)]
        slopes = torch.tensor(own, dtype=precise, device=distances.device)[:, None, None]
        return (distances.to(precise) * slopes).to(dtype)
