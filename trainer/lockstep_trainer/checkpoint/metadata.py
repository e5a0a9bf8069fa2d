"""``.metadata`` of torch's distributed checkpoints: a pickle, read without running what it names.

A pickle can call anything that it can import. Bytes are verified before they come here; the restricted unpickler holds
where the manifest itself was forged: only the classes and dtypes that torch writes there can be named.
"""

from __future__ import annotations

import io
import pickle
from enum import Enum
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from lockstep_trainer.errors import Corrupt

_ALLOWED = {
    "builtins": {"set", "frozenset", "slice"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


def _enum_member(of: object, name: str) -> Enum:
    """What ``getattr`` does in the pickle of an enum member by Python 3.11.0 to 3.11.3, and nothing else of it."""
    if isinstance(of, type) and issubclass(of, Enum):
        return of[name]
    raise pickle.UnpicklingError(f"it asks for {name!r} of {of!r}, which is no enum")


def _is_dtype(name: str) -> bool:
    """All of them: a tensor of any dtype is saved."""
    return isinstance(getattr(torch, name, None), torch.dtype)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _ALLOWED.get(module, ()) or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong there")


def load_metadata(data: bytes, where: str) -> Metadata:
    """The metadata in ``data``; raises Corrupt, naming ``where`` it was found."""
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle may raise nearly anything
        raise Corrupt(f"{where} can't be read: {error}") from None
    if not isinstance(metadata, Metadata):
        raise Corrupt(f"{where} holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    return metadata
