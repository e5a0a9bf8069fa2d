"""Tensors out of torch.save's archives without torch.load: the same, whatever was saved, or left to torch.load."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep_trainer.checkpoint import archive
from lockstep_trainer.checkpoint.archive import tensor_in
from lockstep_trainer.errors import Corrupt

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int8,
    torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def misplaced(data: bytes, by: int) -> memoryview:
    """``data`` at an address ``by`` bytes behind an aligned one."""
    return memoryview(bytearray(64 + by) + bytearray(data))[64 + by :]


@pytest.fixture
def viewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.load is not asked."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was asked"))


@pytest.mark.usefixtures("viewed")
@pytest.mark.parametrize("by", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_is_viewed_in_place(dtype: torch.dtype, by: int) -> None:
    numbers = torch.arange(120) % 100
    tensor = numbers.to(dtype).view(4, 30)
    data = misplaced(saved(tensor), by)
    found = tensor_in(data, "here")
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    if not dtype.is_complex:
        position = found.data_ptr() - torch.frombuffer(data, dtype=torch.uint8).data_ptr()
        assert 0 < position < len(data), "it is a view"


@pytest.mark.usefixtures("viewed")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(7.0),
        torch.empty(0, 5),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12.0).view(3, 4)[1:, 1:3],
        torch.nn.functional.pad(torch.ones(2, 2), (1, 1)),
    ],
    ids=["scalar", "empty", "transposed", "part", "padded"],
)
def test_any_stride_and_shape(tensor: Tensor) -> None:
    found = tensor_in(misplaced(saved(tensor), 0), "here")
    assert found.is_contiguous()
    assert torch.equal(found, tensor)


@pytest.mark.usefixtures("viewed")
def test_an_archive_whose_own_checksum_was_left_out() -> None:
    """Staged copies have none: their bytes change under the same frame."""
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(torch.arange(100.0))
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(tensor_in(misplaced(data, 0), "here"), torch.arange(100.0))


@pytest.mark.parametrize(
    "data",
    [
        saved(torch.ones(3), _use_new_zipfile_serialization=False),
        saved(torch.nn.Parameter(torch.ones(3))),
    ],
    ids=["torch's old format", "a parameter"],
)
def test_what_looks_different_is_left_to_torch(data: bytes) -> None:
    assert archive._viewed(misplaced(data, 0)) is None
    assert torch.equal(tensor_in(memoryview(data), "here"), torch.ones(3))


def repacked(data: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with other records or other compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            name = info.filename.split("/", 1)[-1]
            new.writestr(info.filename, (records or {}).get(name, old.read(info)))
    return out.getvalue()


def test_numbers_of_another_byte_order_or_compressed_are_not_viewed() -> None:
    data = saved(torch.arange(50.0))
    assert archive._viewed(misplaced(repacked(data), 0)) is not None
    assert archive._viewed(misplaced(repacked(data, {"byteorder": b"big"}), 0)) is None
    assert archive._viewed(misplaced(repacked(data, compression=zipfile.ZIP_DEFLATED), 0)) is None


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\5\6" + bytes(18),
        saved(torch.ones(3))[:-30],
        saved({"a": torch.ones(3)}),
        repacked(saved(torch.ones(3)), {"data.pkl": pickle.dumps(_Hostile())}),
        repacked(saved(torch.ones(300)), {"data/0": b"short"}),
    ],
    ids=["nothing", "no records", "cut off", "a dict", "code", "too few numbers"],
)
def test_what_is_no_tensor_is_refused_and_runs_nothing(data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Corrupt, match="here"):
        tensor_in(memoryview(data), "here")
    assert "this ran" not in capsys.readouterr().out
