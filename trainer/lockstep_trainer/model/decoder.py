"""A decoder, whole or a part of it: what it is made of is configuration.

Modules keep the same names whatever part is built, so that a parameter is known by its name at every layout:
``embedding.weight``, ``position.weight``, ``blocks.<layer>.attention.query.weight``, ``norm.weight``, ``head.weight``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from lockstep_trainer.model.attention import Attention, Places, Rope
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.feedforward import FeedForward
from lockstep_trainer.model.norms import build_norm
from lockstep_trainer.model.positions import LearnedPositions, SinusoidalPositions, rotation


@dataclass(frozen=True, slots=True)
class Part:
    """Which layers a module holds; the first part has the embedding, the last one norm and head."""

    layers: Sequence[int]
    first: bool
    last: bool


def whole(config: DecoderConfig) -> Part:
    """All of it."""
    return Part(range(config.layers), first=True, last=True)


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, config.dim)
        self.attention = Attention(config)
        self.ffn_norm = build_norm(config, config.dim)
        self.ffn = _ffn(config, layer)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None) -> Tensor:
        """(B, T, dim) → (B, T, dim)."""
        x = x + self.attention(self.attention_norm(x), rope, mask)
        y: Tensor = x + self.ffn(self.ffn_norm(x))
        return y


def _ffn(config: DecoderConfig, layer: int) -> nn.Module:
    if not config.has_experts(layer):
        return FeedForward(config, config.ffn_dim)
    from lockstep_trainer.model.moe import MoE

    return MoE(config)


def _position(config: DecoderConfig) -> nn.Module | None:
    """What is added to the embedding."""
    if config.positions == "learned":
        return LearnedPositions(config)
    return SinusoidalPositions(config) if config.positions == "sinusoidal" else None


class TiedHead(nn.Module):
    """A head that uses the embedding's weight, without holding it a second time."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: no submodule

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) → (B, T, vocabulary)."""
        return F.linear(x, self._embedding[0].weight)


class Decoder(nn.Module):
    """Token ids to logits, or the part of that way that ``part`` names."""

    def __init__(self, config: DecoderConfig, part: Part | None = None) -> None:
        super().__init__()
        part = part or whole(config)
        self.config, self.part = config, part
        needs_embedding = part.first or (part.last and config.tie_embeddings)
        self.embedding = nn.Embedding(config.vocab_size, config.dim) if needs_embedding else None
        self.position = _position(config) if part.first else None
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in part.layers})
        self.norm = build_norm(config, config.dim) if part.last else None
        self.head: nn.Module | None = None
        if part.last and self.embedding is not None and config.tie_embeddings:
            self.head = TiedHead(self.embedding)
        elif part.last:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.places = Places()
        self.pieces = 1  # along the sequence, of which tensor parallelism lets the parts hand on one

    def forward(self, x: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Token ids (B, T) in the first part, else what the part before gave, (B, T, dim); the last part gives logits
        (B, T, vocabulary).

        ``positions`` and ``documents``, (B, T), are given both or neither: each token's place in its document, and the
        number of its document in the sample. A token sees earlier ones of its own document only.
        """
        config = self.config
        length = x.shape[1] if self.part.first else x.shape[1] * self.pieces
        places = positions if positions is not None else self.places.positions(length, x.device)
        if self.part.first:
            assert self.embedding is not None
            x = self.embedding(x)
        if self.position is not None:
            x = x + self.position(places).to(x.dtype)
        rope = rotation(places, config, x.dtype) if config.positions == "rope" else None
        if config.positions == "alibi":
            mask: Tensor | None = self.places.distances(places, documents, config.window)
        else:
            mask = self.places.mask(places, documents, config.window)
        for block in self.blocks.values():
            x = block(x, rope, mask)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x
