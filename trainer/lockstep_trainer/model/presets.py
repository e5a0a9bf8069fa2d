"""Named architectures, and how a job changes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from lockstep_api.v1alpha1 import ModelSpec
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.config import DecoderConfig

Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Preset:
    """A published architecture, or a small one for tests. ``config.vocab_size`` is that of its own tokenizer."""

    about: str
    config: DecoderConfig


def _llama3(factor: float, **sizes: Any) -> DecoderConfig:
    """Llama 3.1 and 3.2: eight key-value heads, context lengthened from 8,192 to 131,072."""
    return DecoderConfig(
        kv_heads=8, vocab_size=128_256, max_length=131_072, rope_scaling="llama3", rope_factor=factor, **sizes
    )


def _qwen3(**sizes: Any) -> DecoderConfig:
    return DecoderConfig(
        head_size=128,
        vocab_size=151_936,
        max_length=40_960,
        norm_eps=1e-6,
        qk_norm=True,
        rope_theta=1_000_000.0,
        **sizes,
    )


# From the config.json of each model on the Hugging Face Hub.
PRESETS = {
    "llama-debug": Preset(
        "a small Llama for tests",
        DecoderConfig(
            dim=128,
            layers=4,
            heads=4,
            kv_heads=2,
            ffn_dim=384,
            vocab_size=512,
            rope_theta=10_000.0,
            tie_embeddings=True,
        ),
    ),
    "qwen-debug": Preset(
        "a small Qwen 3 for tests: normalised queries and keys, heads wider than dim / heads",
        DecoderConfig(
            dim=128,
            layers=4,
            heads=4,
            kv_heads=2,
            ffn_dim=384,
            vocab_size=512,
            head_size=64,
            norm_eps=1e-6,
            qk_norm=True,
            rope_theta=10_000.0,
            tie_embeddings=True,
        ),
    ),
    "moe-debug": Preset(
        "a small mixture of 8 experts for tests",
        DecoderConfig(
            dim=128,
            layers=4,
            heads=4,
            kv_heads=2,
            ffn_dim=384,
            vocab_size=512,
            norm_eps=1e-6,
            qk_norm=True,
            rope_theta=10_000.0,
            experts=8,
            expert_dim=128,
        ),
    ),
    "llama3-1b": Preset(
        "Llama 3.2 1B", _llama3(32.0, dim=2048, layers=16, heads=32, ffn_dim=8192, tie_embeddings=True)
    ),
    "llama3-3b": Preset(
        "Llama 3.2 3B", _llama3(32.0, dim=3072, layers=28, heads=24, ffn_dim=8192, tie_embeddings=True)
    ),
    "llama3-8b": Preset("Llama 3.1 8B", _llama3(8.0, dim=4096, layers=32, heads=32, ffn_dim=14336)),
    "llama3-70b": Preset("Llama 3.1 70B", _llama3(8.0, dim=8192, layers=80, heads=64, ffn_dim=28672)),
    "llama3-405b": Preset("Llama 3.1 405B", _llama3(8.0, dim=16384, layers=126, heads=128, ffn_dim=53248)),
    "qwen3-0.6b": Preset(
        "Qwen3 0.6B", _qwen3(dim=1024, layers=28, heads=16, kv_heads=8, ffn_dim=3072, tie_embeddings=True)
    ),
    "qwen3-1.7b": Preset(
        "Qwen3 1.7B", _qwen3(dim=2048, layers=28, heads=16, kv_heads=8, ffn_dim=6144, tie_embeddings=True)
    ),
    "qwen3-4b": Preset(
        "Qwen3 4B", _qwen3(dim=2560, layers=36, heads=32, kv_heads=8, ffn_dim=9728, tie_embeddings=True)
    ),
    "qwen3-8b": Preset("Qwen3 8B", _qwen3(dim=4096, layers=36, heads=32, kv_heads=8, ffn_dim=12288)),
    "qwen3-14b": Preset("Qwen3 14B", _qwen3(dim=5120, layers=40, heads=40, kv_heads=8, ffn_dim=17408)),
    "qwen3-32b": Preset("Qwen3 32B", _qwen3(dim=5120, layers=64, heads=64, kv_heads=8, ffn_dim=25600)),
    "mixtral-8x7b": Preset(
        "Mixtral 8x7B v0.1",
        DecoderConfig(
            dim=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            ffn_dim=14336,
            vocab_size=32_000,
            max_length=32_768,
            rope_theta=1_000_000.0,
            experts=8,
            experts_per_token=2,
        ),
    ),
    "qwen3-30b-a3b": Preset(
        "Qwen3 30B-A3B",
        _qwen3(
            dim=2048, layers=48, heads=32, kv_heads=4, ffn_dim=6144, experts=128, experts_per_token=8, expert_dim=768
        ),
    ),
    "qwen3-235b-a22b": Preset(
        "Qwen3 235B-A22B",
        _qwen3(
            dim=4096, layers=94, heads=64, kv_heads=4, ffn_dim=12288, experts=128, experts_per_token=8, expert_dim=1536
        ),
    ),
}

_TYPES = {name: kind for name, kind in get_type_hints(DecoderConfig).items() if name != "vocab_size"}
_MAY_BE_ZERO = frozenset(
    name
    for name, default in ((field.name, field.default) for field in fields(DecoderConfig))
    if default == 0 or name == "balance_rate"
)
_VOCABULARY_MULTIPLE = 64  # rows of embedding and head: whole tiles on a GPU, whole shards on any even width
_GIVEN_BY_WEIGHTS = (
    "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "tie_embeddings", "norm", "qk_norm", "attention_bias",
    "activation", "positions", "experts", "expert_width", "shared_expert_dim", "dense_layers",
)  # fmt: skip
"""What a checkpoint's weights say; the rest of a configuration can be changed when training goes on from them."""


def model_config(spec: ModelSpec, tokens: int, *, checkpoint: DecoderConfig | None = None) -> DecoderConfig:
    """The architecture of a job whose tokenizer has ``tokens`` tokens.

    The vocabulary is rounded up to a multiple of 64. With ``checkpoint``, the architecture in ``spec.init_from``, it is
    the checkpoint's, and so is all that ``spec.overrides`` does not name. Raises UserError with the choices.
    """
    assert spec.preset is not None
    preset = find(spec.preset)
    changes = {name: checked(name, value) for name, value in spec.overrides.items()}
    if checkpoint is None:
        config = with_changes(
            preset.config, changes, vocab_size=-(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        )
    else:
        _check_same(with_changes(preset.config, changes, vocab_size=checkpoint.vocab_size), checkpoint, spec)
        config = with_changes(checkpoint, changes, vocab_size=checkpoint.vocab_size)
        if config.vocab_size < tokens:
            raise UserError(
                f"trainer.model.initFrom: its embedding has {config.vocab_size} rows and the tokenizer {tokens} "
                "tokens; name the checkpoint's own tokenizer in trainer.tokenizer.uri"
            )
    check(config)
    return config


def described(name: str, overrides: dict[str, Value]) -> DecoderConfig:
    """A preset with changes, and the vocabulary of its own tokenizer; raises UserError."""
    config = with_changes(find(name).config, {field: checked(field, value) for field, value in overrides.items()})
    check(config)
    return config


def find(name: str) -> Preset:
    """The preset of that name; raises UserError with the choices."""
    if name not in PRESETS:
        raise UserError(f"trainer.model.preset: {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def with_changes(config: DecoderConfig, changes: dict[str, Value], **more: int) -> DecoderConfig:
    """``config`` with fields replaced."""
    return replace(config, **{**changes, **more})  # type: ignore[arg-type]


def _check_same(wanted: DecoderConfig, checkpoint: DecoderConfig, spec: ModelSpec) -> None:
    differ = [name for name in _GIVEN_BY_WEIGHTS if getattr(wanted, name) != getattr(checkpoint, name)]
    if differ:
        told = ", ".join(f"{name} {getattr(checkpoint, name)} instead of {getattr(wanted, name)}" for name in differ)
        raise UserError(
            f"trainer.model.initFrom: the checkpoint is not a {spec.preset}: it has {told}; choose the preset that it "
            "was made from, or set these in trainer.model.overrides"
        )


def checked(name: str, value: Value) -> Value:
    """An override's value in the field's type; raises UserError where it is none, or there is no such field."""
    field = f"trainer.model.overrides.{name}"
    if name not in _TYPES:
        raise UserError(f"{field}: there is no such field; choose from {', '.join(_TYPES)}")
    kind, least = _TYPES[name], 0 if name in _MAY_BE_ZERO else 1
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{field}: {value!r} is no truth value; write true or false")
    elif kind is int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{field}: {value!r} is no count; write a whole number from {least}")
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (least and not value):  # type: ignore[operator]
            raise UserError(f"{field}: {value!r} is no size; write a number {'above' if least else 'from'} 0")
        return float(value)
    elif value not in get_args(kind):
        raise UserError(f"{field}: {value!r} is unknown; choose one of {', '.join(get_args(kind))}")
    return value


def check(config: DecoderConfig) -> None:
    """Raises UserError where sizes or choices do not go together."""
    problems = [
        (
            not config.head_size and config.dim % config.heads,
            f"dim {config.dim} over {config.heads} heads is no whole width per head; choose a dim that is a multiple "
            "of 2 × heads, or set head_size",
        ),
        (
            config.positions == "rope" and config.head_dim % 2,
            f"a head of {config.head_dim} can't be turned in pairs; choose a dim that is a multiple of 2 × heads, or "
            "an even head_size",
        ),
        (
            config.positions == "sinusoidal" and config.dim % 2,
            f"dim {config.dim} has no halves for sine and cosine; choose an even one",
        ),
        (
            config.heads % config.kv_heads,
            f"kv_heads {config.kv_heads} does not divide heads {config.heads}; choose a divisor",
        ),
        (
            config.rope_scaling != "none" and config.positions != "rope",
            f"rope_scaling {config.rope_scaling} needs positions: rope, and they are {config.positions}; leave it out",
        ),
        (
            config.rope_scaling != "none" and config.rope_factor < 1,
            f"rope_factor {config.rope_factor} would shorten the context; write a number from 1",
        ),
        (
            config.rope_scaling == "llama3" and config.rope_low_frequency >= config.rope_high_frequency,
            f"rope_low_frequency {config.rope_low_frequency} is not below rope_high_frequency "
            f"{config.rope_high_frequency}",
        ),
        (
            config.rope_scaling == "yarn" and config.rope_beta_slow >= config.rope_beta_fast,
            f"rope_beta_slow {config.rope_beta_slow} is not below rope_beta_fast {config.rope_beta_fast}",
        ),
        (
            config.experts and config.experts_per_token > config.experts,
            f"experts_per_token {config.experts_per_token} is more than experts {config.experts}; lower it",
        ),
        (
            not config.experts and config.shared_expert_dim,
            f"shared_expert_dim {config.shared_expert_dim} needs experts; leave it out, or raise ffn_dim",
        ),
    ]
    for wrong, sentence in problems:
        if wrong:
            raise UserError(f"trainer.model: {sentence}")
