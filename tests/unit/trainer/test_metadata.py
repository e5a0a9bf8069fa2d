"""Checkpoint metadata is a pickle: it is read on every Python that writes it, and runs nothing."""

from __future__ import annotations

import pickle

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

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
