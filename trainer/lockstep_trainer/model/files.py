"""The files of an export in Hugging Face's format, and what a folder has of an earlier one. No torch."""

from __future__ import annotations

import re

from lockstep_trainer.storage import ObjectStore

CONFIG = "config.json"
"""Without it no reader takes a folder for a model."""
GENERATION = "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_NAMES = frozenset({CONFIG, GENERATION, INDEX, SINGLE, TOKENIZER, TOKENIZER_CONFIG})
_PART = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_PREFIXES = (CONFIG, GENERATION, "model", "tokenizer")  # the folder itself may hold much else


def part(number: int, total: int) -> str:
    """The name of one file of weights of several; ``number`` counts from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def present(store: ObjectStore) -> tuple[str, ...]:
    """The files in ``store`` with names that an export writes, config.json first. Raises StoreError."""
    keys = (entry.key for prefix in _PREFIXES for entry in store.list(prefix))
    return tuple(key for key in keys if key in _NAMES or _PART.fullmatch(key))


def clear(store: ObjectStore) -> None:
    """Remove them, config.json first: what a failure leaves behind is no model. Raises StoreError."""
    for key in present(store):
        store.delete(key)
