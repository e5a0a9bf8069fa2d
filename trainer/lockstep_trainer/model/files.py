"""The files of an export in Hugging Face's format, and what a folder has of an earlier one. No torch."""

from __future__ import annotations

import re

from lockstep_trainer.errors import StoreError
from lockstep_trainer.storage import ObjectStore

CONFIG = "config.json"
"""Without it no reader takes a folder for a model."""
GENERATION = "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_NAMES = (CONFIG, GENERATION, INDEX, SINGLE, TOKENIZER, TOKENIZER_CONFIG)
_PARTS = "model-"
_PART = re.compile(rf"{_PARTS}\d{{5,}}-of-\d{{5,}}\.safetensors")


def part(number: int, total: int) -> str:
    """The name of one file of weights of several; ``number`` counts from 1."""
    return f"{_PARTS}{number:05d}-of-{total:05d}.safetensors"


def present(store: ObjectStore) -> tuple[str, ...]:
    """The files in ``store`` with names that an export writes, config.json first. Raises StoreError."""
    # Each by itself: the folder may hold much else, and folders that can't be read.
    names = tuple(name for name in _NAMES if any(entry.key == name for entry in store.list(name)))
    return names + _parts(store)


def clear(store: ObjectStore) -> None:
    """Remove them, config.json first: what a failure leaves behind is no model. Raises StoreError.

    Who may write need not be allowed to list: parts that can't be seen stay, since without the index that names them
    nobody reads them.
    """
    for name in _NAMES:
        _remove(store, name)
    try:
        parts = _parts(store)
    except StoreError as error:
        if error.temporary:
            raise
        return
    for key in parts:
        store.delete(key)


def _parts(store: ObjectStore) -> tuple[str, ...]:
    return tuple(entry.key for entry in store.list(_PARTS) if _PART.fullmatch(entry.key))


def _remove(store: ObjectStore, key: str) -> None:
    try:
        store.delete(key)
    except StoreError as error:  # who may not delete can write where nothing is in the way
        if error.temporary or _is_there(store, key):
            raise


def _is_there(store: ObjectStore, key: str) -> bool:
    try:
        store.head(key)
    except StoreError as error:  # S3 denies what is not there to those who may not list
        if error.temporary:
            raise
        return False
    return True
