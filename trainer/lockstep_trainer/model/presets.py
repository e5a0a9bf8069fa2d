"""Named architectures, and how a job changes them."""

from __future__ import annotations

from dataclasses import fields, replace

from lockstep_api.v1alpha1 import ModelSpec
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.config import DecoderConfig

# vocab_size is set from the tokenizer. Sizes of llama3-*: the model cards of Llama 3, 3.1 and 3.2.
_PRESETS = {
    "llama-debug": DecoderConfig(
        dim=128, layers=4, heads=4, kv_heads=2, ffn_dim=384, vocab_size=0, rope_theta=10_000.0, tie_embeddings=True
    ),
    "llama3-1b": DecoderConfig(
        dim=2048, layers=16, heads=32, kv_heads=8, ffn_dim=8192, vocab_size=0, tie_embeddings=True
    ),
    "llama3-3b": DecoderConfig(
        dim=3072, layers=28, heads=24, kv_heads=8, ffn_dim=8192, vocab_size=0, tie_embeddings=True
    ),
    "llama3-8b": DecoderConfig(dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336, vocab_size=0),
    "llama3-70b": DecoderConfig(dim=8192, layers=80, heads=64, kv_heads=8, ffn_dim=28672, vocab_size=0),
}
_CHANGEABLE = {field.name: field.type for field in fields(DecoderConfig) if field.name != "vocab_size"}
_VOCABULARY_MULTIPLE = 64  # rows of embedding and head: whole tiles on a GPU, whole shards on any even width


def model_config(spec: ModelSpec, tokens: int) -> DecoderConfig:
    """The architecture of a job whose tokenizer has ``tokens`` tokens; raises UserError with the choices."""
    if spec.preset not in _PRESETS:
        raise UserError(f"trainer.model.preset: {spec.preset!r} is unknown; choose one of {', '.join(_PRESETS)}")
    changes: dict[str, int | float | bool | str] = {}
    for name, value in spec.overrides.items():
        changes[name] = _checked(name, value)
    vocabulary = -(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    config = replace(_PRESETS[spec.preset], vocab_size=vocabulary, **changes)  # type: ignore[arg-type]
    _check_sizes(config)
    return config


def _checked(name: str, value: int | float | bool | str) -> int | float | bool | str:
    field = f"trainer.model.overrides.{name}"
    if name not in _CHANGEABLE:
        raise UserError(f"{field}: there is no such field; choose from {', '.join(_CHANGEABLE)}")
    kind = _CHANGEABLE[name]
    if kind == "bool" and not isinstance(value, bool):
        raise UserError(f"{field}: {value!r} is no truth value; write true or false")
    if kind == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{field}: {value!r} is no count; write a whole number from 1")
    if kind == "float" and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
        raise UserError(f"{field}: {value!r} is no size; write a number above 0")
    return value


def _check_sizes(config: DecoderConfig) -> None:
    if config.dim % config.heads or config.head_dim % 2:
        raise UserError(
            f"trainer.model: dim {config.dim} over {config.heads} heads is no even width per head; "
            "choose a dim that is a multiple of 2 × heads"
        )
    if config.heads % config.kv_heads:
        raise UserError(
            f"trainer.model: kv_heads {config.kv_heads} does not divide heads {config.heads}; choose a divisor"
        )
