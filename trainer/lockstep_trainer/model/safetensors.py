"""The safetensors file format: 8 bytes with the header's length, a JSON header, then the tensors' bytes.

Files are read in ranges and built from pieces, so that neither reading nor writing needs a whole model in memory.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from lockstep_trainer.errors import UserError
from lockstep_trainer.storage import ObjectStore

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_LARGEST_HEADER = 100_000_000  # as the reference implementation


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies."""

    key: str  # the file's
    offset: int  # of its first byte in the file
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return self.dtype.itemsize * prod(self.shape[1:])


def header(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a file that holds these tensors (name, type, shape) in this order, without gaps."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + dtype.itemsize * prod(shape)
        fields[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text


def read_header(store: ObjectStore, key: str) -> dict[str, Stored]:
    """The tensors of a file by name; raises UserError where it is damaged or has types that can't be trained."""
    where = f"{store.uri}/{key}"
    beginning = store.get_range(key, 0, 8)
    size = int.from_bytes(beginning, "little")
    if len(beginning) < 8 or size > _LARGEST_HEADER:
        raise UserError(f"{where} is no safetensors file")
    text = store.get_range(key, 8, size)
    try:
        fields = json.loads(text)
        found = {}
        for name, entry in fields.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{where}: {name} has type {entry['dtype']}; only {', '.join(DTYPES)} can be read")
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            start, end = entry["data_offsets"]
            if end - start != dtype.itemsize * prod(shape):
                raise UserError(f"{where}: {name} has {end - start} bytes, which do not make its shape {shape}")
            found[name] = Stored(key, 8 + size + start, dtype, shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: its header can't be read: {error}") from None
    return found
