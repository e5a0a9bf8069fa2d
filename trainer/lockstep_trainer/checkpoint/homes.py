"""Tensors that a restore reads straight to where they belong, with no buffer in between.

That goes where a rank wants all of an item, in host memory and in one piece, and where its archive looks as torch.save
writes it here: then it is known where in the file the numbers will stand before a byte is read. Whether they did is
looked at behind the checksum; until then, and where they did not, what lies in the tensor means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep_trainer.checkpoint.archive import is_around
from lockstep_trainer.checkpoint.fetch import Item
from lockstep_trainer.checkpoint.pieces import Targets
from lockstep_trainer.checkpoint.planning import make_frame

_LEAST_BYTES = 256 * 1024
"""Smaller tensors are not worth the request's being cut up."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where the numbers of an item go."""

    tensor: Tensor  # contiguous, in host memory
    head: int  # bytes of the archive before the numbers
    size: int  # bytes of the numbers
    tail: int  # bytes behind them

    @property
    def memory(self) -> memoryview:
        """The tensor's own."""
        return self.tensor.view(-1).view(torch.uint8).numpy().data

    def fits(self, head: memoryview, tail: memoryview) -> bool:
        """Whether an archive with this ``head`` and ``tail``, both verified, had its numbers in between, in order."""
        return is_around(bytes(head), self.size, bytes(tail), self.tensor.dtype, tuple(self.tensor.shape))


def homes(numbers: Iterable[int], items: Mapping[int, Item], targets: Targets) -> dict[int, Home]:
    """Those of the items with these numbers that have one."""
    found = {}
    for number in numbers:
        item = items[number]
        size = math.prod(item.shape) * item.dtype.itemsize
        if size < _LEAST_BYTES:
            continue
        whole = ((0,) * len(item.shape), item.shape)
        tensor = next((place for place in targets.get(number, {}).get(whole, ()) if is_plain(place)), None)
        if tensor is None:
            continue
        frame = make_frame(item.dtype, item.shape)
        if len(frame.head) + size + len(frame.tail) == item.length:
            found[number] = Home(tensor, len(frame.head), size, len(frame.tail))
    return found


def is_plain(place: Tensor) -> bool:
    """Whether its numbers stand in host memory in one piece."""
    return place.device.type == "cpu" and place.is_contiguous()
