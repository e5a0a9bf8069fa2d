"""A language model without attention: gated causal convolutions (after Dauphin et al. 2017)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Block(nn.Module):
    """x + gate(conv(norm(x))): each token sees itself and the ``width`` − 1 tokens before it."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv1d(dim, 2 * dim, width)
        self.out = nn.Linear(dim, dim, bias=False)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) → the same."""
        past = F.pad(self.norm(x).transpose(1, 2), (self.width - 1, 0))
        value, gate = self.conv(past).transpose(1, 2).chunk(2, dim=-1)
        return x + self.out(value * torch.sigmoid(gate))


class ConvolutionModel(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, vocab_size: int, layers: int, dim: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        # Lockstep gathers and frees the weights of what is in `blocks` one by one.
        self.blocks = nn.ModuleList(Block(dim, width) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, T, vocabulary)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(vocab_size: int, *, layers: int = 4, dim: int = 64, width: int = 4) -> nn.Module:
    """What `model.module: ownmodel:build` names; `model.overrides` are its keyword arguments."""
    return ConvolutionModel(vocab_size, layers, dim, width)
