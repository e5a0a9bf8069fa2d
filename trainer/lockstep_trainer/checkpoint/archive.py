"""A tensor out of the bytes of torch.save, without copying its numbers.

torch.save writes a zip archive of stored records: ``data.pkl`` says what the tensor is, ``data/0`` are its numbers.
torch.load copies these twice and takes some 0.4 ms for each archive; where the archive looks as torch.save has always
written it the numbers are viewed in place instead, and torch.load reads what looks in any way different.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lockstep_trainer.errors import Corrupt

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip's record: the last two are the lengths of name and extra field
_ORDER = b"little"
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
}  # fmt: skip
"""The names that stand for dtypes in archives; newer dtypes go by their own."""


def tensor_in(data: memoryview, where: str) -> Tensor:
    """The tensor in the archive ``data``, contiguous, on the CPU; it may share memory with ``data``.

    ``data`` must have been verified. Raises Corrupt, naming ``where`` it was found, for what is no tensor.
    """
    found = _viewed(data)
    if found is None:
        try:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # of zip, of pickle, of torch
            raise Corrupt(f"{where} can't be read: {error}") from error
        if not isinstance(found, Tensor):
            raise Corrupt(f"{where} holds a {type(found).__name__}, not a tensor")
    return found.contiguous()


def _viewed(data: memoryview) -> Tensor | None:
    """The tensor over ``data`` itself; None where the archive is not what torch.save writes for one dense tensor."""
    try:
        records, shape = _opened(data)
        begin, size = _place(data, records[f"data/{shape.key}"])
        numbers = data[begin : begin + size]
        raw = torch.frombuffer(numbers, dtype=torch.uint8) if numbers else torch.empty(0, dtype=torch.uint8)
        # Numbers of any other dtype may be read from any address, as far as processors and torch's copies go.
        if shape.dtype.is_complex and raw.data_ptr() % shape.dtype.itemsize:
            raw = raw.clone()
        return torch.as_strided(raw.view(shape.dtype), shape.size, shape.stride, shape.offset)
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, struct.error, pickle.UnpicklingError):
        return None


class Alike:
    """Tensors out of many archives. Those with the same numbers of bytes, dtype and shape mostly differ in nothing but
    their numbers, and are then taken apart only once."""

    def __init__(self) -> None:
        self._heads: dict[tuple[int, torch.dtype, tuple[int, ...]], int] = {}

    def tensor_in(self, data: memoryview, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> Tensor:
        """As the function of this name; ``dtype`` and ``shape`` are what it should hold, and need not be."""
        key = len(data), dtype, shape
        head, size = self._heads.get(key), math.prod(shape) * dtype.itemsize
        if head is not None and is_around(bytes(data[:head]), size, bytes(data[head + size :]), dtype, shape):
            return torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=head).view(shape)
        found = tensor_in(data, where)
        head = found.data_ptr() - torch.frombuffer(data, dtype=torch.uint8).data_ptr()
        # Where it is not a view of ``data`` there is nothing to go by.
        if 0 < head < len(data) and size and not found.data_ptr() % dtype.itemsize:
            self._heads[key] = head
        return found


@lru_cache(maxsize=4096)
def is_around(head: bytes, size: int, tail: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether an archive of ``head``, ``size`` bytes and ``tail`` is a tensor of this dtype and shape whose numbers, in
    order, are just those bytes. ``head`` and ``tail`` must have been verified."""
    data = _Hollow(head, size, tail)
    try:
        records, found = _opened(data)
        begin, length = _place(data, records[f"data/{found.key}"])
    except (zipfile.BadZipFile, KeyError, ValueError, struct.error, pickle.UnpicklingError):
        return False
    return (begin, length, found) == (len(head), size, _Shape(found.key, dtype, shape, _strides(shape), 0))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


@dataclass(frozen=True, slots=True)
class _Hollow:
    """An archive of which only the ends are there; zeros stand for the numbers."""

    head: bytes
    size: int
    tail: bytes

    def __len__(self) -> int:
        return len(self.head) + self.size + len(self.tail)

    def __getitem__(self, place: slice) -> bytes:
        start, stop, _ = place.indices(len(self))
        begin, end = len(self.head), len(self.head) + self.size
        zeros = max(0, min(stop, end) - max(start, begin))
        return self.head[start:stop] + bytes(zeros) + self.tail[max(start - end, 0) : max(stop - end, 0)]


_Data = memoryview | _Hollow


class _Reader(io.RawIOBase):
    """A buffer as a file, since io.BytesIO would copy all of it."""

    def __init__(self, data: _Data) -> None:
        self._data, self._at = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if self._at < 0:
            raise ValueError("a negative position")
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else self._at + size
        found = bytes(self._data[self._at : end])
        self._at += len(found)
        return found


def _opened(data: _Data) -> tuple[dict[str, zipfile.ZipInfo], _Shape]:
    """The archive's records by name, and its tensor; raises BadZipFile, KeyError, UnpicklingError or struct.error for
    anything but one dense tensor in this machine's order of bytes."""
    with zipfile.ZipFile(_Reader(data)) as archive:
        records = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
    shape = _shape_of(_record(data, records["data.pkl"]))
    if "byteorder" in records and _record(data, records["byteorder"]) != _ORDER:
        raise zipfile.BadZipFile("another order of bytes")
    return records, shape


def _place(data: _Data, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a stored record's bytes begin, and how many they are. The archive's own CRC32 is not looked at: the whole
    of it was verified before."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile("a compressed record")
    *_, name, extra = _LOCAL_HEADER.unpack(data[info.header_offset : info.header_offset + _LOCAL_HEADER.size])
    begin = info.header_offset + _LOCAL_HEADER.size + name + extra
    if begin + info.file_size > len(data):
        raise zipfile.BadZipFile("a record ends behind the archive")
    return begin, info.file_size


def _record(data: _Data, info: zipfile.ZipInfo) -> bytes:
    begin, size = _place(data, info)
    return bytes(data[begin : begin + size])


@dataclass(frozen=True, slots=True)
class _Shape:
    """What ``data.pkl`` says of a tensor; offset and stride in elements."""

    key: str
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _rebuild(storage: tuple[str, torch.dtype], offset: int, size: Any, stride: Any, *more: Any) -> _Shape:
    """In the place of ``torch._utils._rebuild_tensor_v2`` and ``_v3``, which has the dtype behind the hooks."""
    key, dtype = storage
    return _Shape(key, more[2] if len(more) > 2 and isinstance(more[2], torch.dtype) else dtype, size, stride, offset)


class _Unpickler(pickle.Unpickler):
    """Knows the names in the pickle of one plain tensor, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")}:
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.uint8  # the dtype itself stands elsewhere
        if module == "torch":
            found = _STORAGES.get(name, getattr(torch, name, None))
            if isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("no storage")
        return key, dtype


@lru_cache(maxsize=4096)
def _shape_of(data: bytes) -> _Shape:
    """``data.pkl`` read; tensors of one shape and dtype have the same. Raises UnpicklingError for anything else."""
    try:
        found = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a strange pickle may raise nearly anything
        raise pickle.UnpicklingError(str(error)) from None
    if not isinstance(found, _Shape):
        raise pickle.UnpicklingError("no tensor")
    return found
