"""A number that says which bits a tensor has."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CHUNK = 2**20
"""Words that are at hand as int64 at a time, 8 MiB."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_MASK = 2**64 - 1


def digest(tensor: Tensor) -> Tensor:
    """64 bits over the values of ``tensor`` in their order, whatever its strides: an int64 scalar on its device, which
    the host does not wait for.

    A sum of words, each multiplied by an odd number that its place decides, modulo 2⁶⁴. A change within one word of at
    most 32 bits is always seen, since an odd number has an inverse. Changes in several words cancel each other with
    probability 2⁻³² at most (where all are in the words' highest bits; with a 64-bit word two flipped signs would
    cancel each other always, so words are smaller). Shape and type are not part of it.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    factors = _factors(words.device)
    for number, start in enumerate(range(0, len(words), CHUNK)):
        chunk = words[start : start + CHUNK]
        total += _dot(chunk.to(torch.int64), factors[: len(chunk)]) * _odd(number)
    return total


def _dot(words: Tensor, factors: Tensor) -> Tensor:
    # CUDA has no dot product of integers. Integers add up to the same in any order.
    return torch.dot(words, factors) if words.device.type == "cpu" else (words * factors).sum()


@cache
def _factors(device: torch.device) -> Tensor:
    """The odd factor of each place in a chunk."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (CHUNK,), generator=generator)
    return (drawn | 1).to(device)


@cache
def _odd(number: int) -> int:
    """The odd factor of a chunk, as int64: splitmix64 (Steele et al. 2014) of its number."""
    x = (number + 1) * 0x9E3779B97F4A7C15 & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    x = (x ^ x >> 31) | 1
    return x - 2**64 if x >= 2**63 else x
