"""Checkpoint metadata is a pickle: it is read on every Python that writes it, and runs nothing."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from lockstep_trainer.checkpoint.metadata import load_metadata
from lockstep_trainer.errors import Corrupt


class _ByName:
    """Pickles as ``getattr(of, name)``, which is how Python 3.11.0 to 3.11.3 pickle an enum member."""

    def __init__(self, of: object, name: str) -> None:
        self._call = getattr, (of, name)

    def __reduce__(self) -> object:
        return self._call


def metadata_with(value: object) -> bytes:
    return pickle.dumps(Metadata(state_dict_metadata={"x": value}))  # type: ignore[dict-item]


def test_an_enum_member_pickled_by_name_is_read() -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    read = load_metadata(metadata_with(_ByName(_MEM_FORMAT_ENCODING, member.name)), "x")
    assert read.state_dict_metadata == {"x": member}


def test_an_attribute_of_anything_else_is_refused() -> None:
    with pytest.raises(Corrupt, match="is no enum"):
        load_metadata(metadata_with(_ByName(Metadata, "__init__")), "x")


@pytest.mark.parametrize("dtype", sorted({str(each) for each in vars(torch).values() if isinstance(each, torch.dtype)}))
def test_every_dtype_is_read(dtype: str) -> None:
    properties = TensorProperties(dtype=getattr(torch, dtype.removeprefix("torch.")))
    saved = TensorStorageMetadata(properties, torch.Size([2]), [])
    assert load_metadata(metadata_with(saved), "x").state_dict_metadata == {"x": saved}


def test_nothing_else_of_torch_is_read() -> None:
    for name in ("load", "float32.__class__", "nothing"):
        with pytest.raises(Corrupt, match="which does not belong there"):
            load_metadata(f"ctorch\n{name}\n.".encode(), "x")
