"""Every parameter's name and shape, from the configuration alone: without torch, and without allocating anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from lockstep_trainer.model.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of the decoder."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def weights(
    config: DecoderConfig, layers: Sequence[int] | None = None, *, first: bool = True, last: bool = True
) -> tuple[Weight, ...]:
    """The parameters of the decoder, or of the part that holds ``layers``, in the order of the module.

    As in ``decoder.Part``: the first part has the embedding, the last one norm and head, with a tied head its own
    copy of the embedding.
    """
    layers = range(config.layers) if layers is None else layers
    return tuple(_weights(config, layers, first, last))


def layer_weights(config: DecoderConfig, layer: int) -> tuple[Weight, ...]:
    """The parameters of one layer; names begin behind ``blocks.<layer>.``."""
    return tuple(_block(config, layer))


def parameter_count(config: DecoderConfig, *, active: bool = False) -> int:
    """Number of parameters; with ``active`` only those that a token meets: of the experts, the chosen ones."""
    if not active or not config.experts:
        return sum(weight.count for weight in weights(config))
    idle = config.experts - config.experts_per_token
    return sum(
        weight.count - (weight.count // config.experts * idle if is_expert(weight.name) else 0)
        for weight in weights(config)
    )


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to the experts that tokens choose between."""
    return ".ffn.experts." in name


def _weights(config: DecoderConfig, layers: Sequence[int], first: bool, last: bool) -> Iterator[Weight]:
    if first or (last and config.tie_embeddings):
        yield Weight("embedding.weight", (config.vocab_size, config.dim))
    if first and config.positions == "learned":
        yield Weight("position.weight", (config.max_length, config.dim))
    for layer in layers:
        for weight in _block(config, layer):
            yield Weight(f"blocks.{layer}.{weight.name}", weight.shape)
    if last:
        yield from _norm(config, "norm", config.dim)
        if not config.tie_embeddings:
            yield Weight("head.weight", (config.vocab_size, config.dim))


def _block(config: DecoderConfig, layer: int) -> Iterator[Weight]:
    wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield from _norm(config, "attention_norm", config.dim)
    for name, width in (("query", wide), ("key", narrow), ("value", narrow)):
        yield Weight(f"attention.{name}.weight", (width, config.dim))
        if config.attention_bias:
            yield Weight(f"attention.{name}.bias", (width,))
    yield Weight("attention.output.weight", (config.dim, wide))
    if config.qk_norm:
        yield from _norm(config, "attention.query_norm", config.head_dim)
        yield from _norm(config, "attention.key_norm", config.head_dim)
    yield from _norm(config, "ffn_norm", config.dim)
    if not config.has_experts(layer):
        yield from _feed_forward(config, "ffn", config.ffn_dim)
        return
    yield Weight("ffn.router.weight", (config.experts, config.dim))
    inside, outside = (
        (config.experts, config.expert_width, config.dim),
        (config.experts, config.dim, config.expert_width),
    )
    if config.gated:
        yield Weight("ffn.experts.gate", inside)
    yield Weight("ffn.experts.up", inside)
    yield Weight("ffn.experts.down", outside)
    if config.shared_expert_dim:
        yield from _feed_forward(config, "ffn.shared", config.shared_expert_dim)


def _feed_forward(config: DecoderConfig, name: str, width: int) -> Iterator[Weight]:
    if config.gated:
        yield Weight(f"{name}.gate.weight", (width, config.dim))
    yield Weight(f"{name}.up.weight", (width, config.dim))
    yield Weight(f"{name}.down.weight", (config.dim, width))


def _norm(config: DecoderConfig, name: str, width: int) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (width,))
    if config.norm == "layer":
        yield Weight(f"{name}.bias", (width,))
