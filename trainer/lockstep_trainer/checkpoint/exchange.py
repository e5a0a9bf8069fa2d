"""What one rank read and others need: packed into parcels, passed on, and copied to where it belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.checkpoint.ahead import Arrived
from lockstep_trainer.checkpoint.fetch import Box, Parcel, Round

Targets = Mapping[int, Mapping[Box, Sequence[Tensor]]]
"""Where this rank wants boxes of items, by the item's number: views of the live state, each in the box's shape and the
item's dtype."""


def exchange(each: Round, arrived: Sequence[Arrived], targets: Targets, group: dist.ProcessGroup | None) -> None:
    """Do a round: all ranks of ``group`` (gloo) call it, each with what it read, once all of that was verified.

    No rank waits for others in a circle: each posts at once all that it is to receive, and passes parcels on in the
    order that all ranks have.
    """
    rank = dist.get_rank(group)
    tensors = {number: tensor for one in arrived for number, tensor in one.tensors.items()}
    sent: list[tuple[Any, Tensor]] = []  # with each send its buffer, which must live as long

    def pass_on(parcel: Parcel, tag: int, buffer: Tensor) -> None:
        for child in parcel.children(rank):
            sent.append((dist.isend(buffer, group=group, group_dst=child, tag=tag), buffer))

    own, coming = [], []
    for tag, parcel in enumerate(parcel for read in each for parcel in read.parcels):
        if parcel.route[0] == rank:
            own.append((tag, parcel))
        elif rank in parcel.route:
            buffer = torch.empty(parcel.size, dtype=torch.uint8)
            work: Any = dist.irecv(buffer, group=group, group_src=parcel.source(rank), tag=tag)
            coming.append((tag, parcel, buffer, work))
    for tag, parcel in own:
        pass_on(parcel, tag, _packed(parcel, tensors))
    for number, tensor in tensors.items():
        for box, places in targets.get(number, {}).items():
            _copy(_cut(tensor, box), places)
    for tag, parcel, buffer, work in coming:
        work.wait()
        pass_on(parcel, tag, buffer)
        for (number, box), piece in zip(parcel.wants, _pieces(parcel, buffer), strict=True):
            places = targets[number][box]
            _copy(piece.view(places[0].dtype).view(box[1]), places)
    for work, _ in sent:
        work.wait()


def _packed(parcel: Parcel, tensors: Mapping[int, Tensor]) -> Tensor:
    """The parcel's bytes: a copy, unless it is a single box whose numbers stand together."""
    boxes = [_cut(tensors[number], box) for number, box in parcel.wants]
    if len(boxes) == 1 and boxes[0].is_contiguous():
        return boxes[0].view(-1).view(torch.uint8)
    buffer = torch.empty(parcel.size, dtype=torch.uint8)
    for box, piece in zip(boxes, _pieces(parcel, buffer), strict=True):
        piece.view(box.dtype).view(box.shape).copy_(box)
    return buffer


def _pieces(parcel: Parcel, buffer: Tensor) -> list[Tensor]:
    """The bytes of each box."""
    return [buffer[begin : begin + size] for begin, size in parcel.places]


def _cut(tensor: Tensor, box: Box) -> Tensor:
    for dim, (offset, length) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def _copy(source: Tensor, places: Sequence[Tensor]) -> None:
    for place in places:
        place.copy_(source)
