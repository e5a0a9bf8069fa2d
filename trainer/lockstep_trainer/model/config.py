"""What a decoder looks like: sizes and choices, without torch, so that the command line can describe it.

Field names follow the papers; ``lockstep_trainer.model.presets`` has the named ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "reglu", "geglu", "gelu", "relu"]
Positions = Literal["rope", "alibi", "learned", "sinusoidal"]
RopeScaling = Literal["none", "llama3", "yarn"]
Routing = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and choices of a decoder. ``vocab_size`` comes from the tokenizer."""

    dim: int  # width of the residual stream
    layers: int
    heads: int
    kv_heads: int  # fewer than heads: grouped queries; 1: multi-query
    ffn_dim: int
    vocab_size: int
    head_size: int = 0  # width of one head; 0: dim / heads
    max_length: int = 8192  # positions that a learned table holds, and what an export states
    tie_embeddings: bool = False

    norm: Norm = "rms"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    attention_bias: bool = False  # on query, key and value
    activation: Activation = "swiglu"
    window: int = 0  # a token sees so many positions, itself included; 0: all before it

    positions: Positions = "rope"
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling = "none"
    rope_factor: float = 1.0  # by how much the context is longer than rope_original_length
    rope_original_length: int = 8192
    rope_low_frequency: float = 1.0  # llama3
    rope_high_frequency: float = 4.0  # llama3
    rope_beta_fast: float = 32.0  # yarn
    rope_beta_slow: float = 1.0  # yarn

    experts: int = 0  # of a layer; 0: dense
    experts_per_token: int = 2
    expert_dim: int = 0  # width inside one expert; 0: ffn_dim
    shared_expert_dim: int = 0  # width of the experts that see every token; 0: none
    dense_layers: int = 0  # so many layers at the start have no experts
    routing: Routing = "softmax"
    normalize_routing: bool = True  # the chosen experts' weights sum to 1
    balance_rate: float = 1e-3  # step of the bias that balances experts (Wang et al. 2024); 0 turns it off

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.head_size or self.dim // self.heads

    @property
    def expert_width(self) -> int:
        """Width inside one expert; 0 without experts."""
        return (self.expert_dim or self.ffn_dim) if self.experts else 0

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part has a gate beside its up projection."""
        return self.activation in ("swiglu", "reglu", "geglu")

    def has_experts(self, layer: int) -> bool:
        """Whether layer ``layer`` (the first is 0) is a mixture of experts."""
        return self.experts > 0 and layer >= self.dense_layers
