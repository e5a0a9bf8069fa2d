"""A digest sees every changed bit and the order of values, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep_trainer.replay.digest import CHUNK, digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def values(count: int, dtype: torch.dtype) -> Tensor:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (100 * noise).abs().to(dtype) if not dtype.is_floating_point else noise.to(dtype)


def flipped(tensor: Tensor, place: int, bit: int) -> Tensor:
    changed = tensor.clone()
    octets = changed.view(torch.uint8)
    octets[place * tensor.element_size() + bit // 8] ^= 1 << bit % 8
    return changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_flipped_bit_changes_it(dtype: torch.dtype) -> None:
    tensor = values(37, dtype)
    whole = digest(tensor)
    for place in (0, 1, 36):
        for bit in range(8 * tensor.element_size()):
            assert digest(flipped(tensor, place, bit)) != whole


def test_flipped_signs_do_not_cancel_each_other() -> None:
    tensor = values(64, torch.float32)
    seen = {int(digest(tensor))}
    pairs = [(first, second) for first in range(64) for second in range(first)]
    for first, second in pairs:
        seen.add(int(digest(flipped(flipped(tensor, first, 31), second, 31))))
    assert len(seen) == len(pairs) + 1


def test_order_matters_within_a_chunk_and_between_chunks() -> None:
    tensor = values(CHUNK + 10, torch.float32)
    for first, second in ((0, 1), (3, CHUNK + 3), (CHUNK, CHUNK + 9)):
        swapped = tensor.clone()
        swapped[[first, second]] = tensor[[second, first]]
        assert digest(swapped) != digest(tensor)


def test_strides_do_not_matter() -> None:
    tensor = values(12, torch.bfloat16).view(3, 4)
    assert digest(tensor.t().contiguous().t()) == digest(tensor)
    assert digest(tensor[:, 1:3]) == digest(tensor[:, 1:3].clone())


def test_signs_of_zero_and_kinds_of_nan_are_told_apart() -> None:
    zeros = torch.zeros(3)
    assert digest(zeros) != digest(-zeros)
    assert digest(torch.empty(0)) == 0
