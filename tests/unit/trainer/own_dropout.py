"""A model of a user's own that draws at random, as ``model.module`` takes it."""

from __future__ import annotations

from torch import Tensor, nn


class Dropping(nn.Module):
    """Half of each embedding is dropped."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding, self.dropout, self.head = (
            nn.Embedding(vocab_size, 16),
            nn.Dropout(0.5),
            nn.Linear(16, vocab_size),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each next token by the last one alone."""
        logits: Tensor = self.head(self.dropout(self.embedding(tokens)))
        return logits


def dropping(vocab_size: int) -> Dropping:
    """The model."""
    return Dropping(vocab_size)
