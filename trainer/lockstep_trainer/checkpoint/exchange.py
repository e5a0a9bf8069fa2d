"""What one rank read and others need: packed into parcels, passed on, and copied to where it belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.checkpoint.ahead import Arrived
from lockstep_trainer.checkpoint.arena import Arena
from lockstep_trainer.checkpoint.fetch import Parcel, Round
from lockstep_trainer.checkpoint.homes import is_plain
from lockstep_trainer.checkpoint.pieces import Targets, cut


class Exchange:
    """The rounds of a restore, as far as ranks need something of each other."""

    def __init__(self, targets: Targets, group: dist.ProcessGroup | None, *, max_bytes: int) -> None:
        """``group``: gloo; ``max_bytes``: of what is packed and received in a round."""
        self._targets, self._group = targets, group
        self._rank = dist.get_rank(group)
        # Twice, since what is lent may be twice as large as what was asked for.
        self._arena = Arena(2 * max_bytes)

    def run(self, each: Round, arrived: Sequence[Arrived]) -> None:
        """Do a round: all ranks of the group call it, each with what it read, once all of that was verified.

        No rank waits for others in a circle: each posts at once all that it is to receive, and passes parcels on in the
        order that all ranks have.
        """
        tensors = {number: tensor for one in arrived for number, tensor in one.tensors.items()}
        lent: list[memoryview] = []
        sent: list[tuple[Any, Tensor]] = []  # with each send its buffer, which must live as long

        def pass_on(parcel: Parcel, tag: int, buffer: Tensor) -> None:
            for child in parcel.children(self._rank):
                sent.append((dist.isend(buffer, group=self._group, group_dst=child, tag=tag), buffer))

        own, coming = [], []
        for tag, parcel in enumerate(parcel for read in each for parcel in read.parcels):
            if parcel.route[0] == self._rank:
                own.append((tag, parcel))
            elif self._rank in parcel.route:
                place = self._place(parcel)
                buffer = _bytes_of(place) if place is not None else self._lend(parcel.size, lent)
                source = parcel.source(self._rank)
                work: Any = dist.irecv(buffer, group=self._group, group_src=source, tag=tag)
                coming.append((tag, parcel, buffer, place, work))
        for tag, parcel in own:
            pass_on(parcel, tag, self._packed(parcel, tensors, lent))
        for tag, parcel, buffer, place, work in coming:
            work.wait()
            pass_on(parcel, tag, buffer)
            for (number, box), piece in zip(parcel.wants, _pieces(parcel, buffer), strict=True):
                for target in self._targets[number][box]:
                    if target is not place:
                        target.copy_(piece.view(target.dtype).view(box[1]))
        for work, _ in sent:
            work.wait()
        for memory in lent:
            self._arena.give_back(memory)

    def _place(self, parcel: Parcel) -> Tensor | None:
        """Where all of a parcel belongs in one piece: it is received there."""
        if len(parcel.wants) > 1:
            return None
        number, box = parcel.wants[0]
        return next((place for place in self._targets[number][box] if is_plain(place)), None)

    def _packed(self, parcel: Parcel, tensors: Mapping[int, Tensor], lent: list[memoryview]) -> Tensor:
        """The parcel's bytes: a copy, unless it is a single box whose numbers stand together."""
        boxes = [cut(tensors[number], box) for number, box in parcel.wants]
        if len(boxes) == 1 and boxes[0].is_contiguous():
            return _bytes_of(boxes[0])
        buffer = self._lend(parcel.size, lent)
        for box, piece in zip(boxes, _pieces(parcel, buffer), strict=True):
            piece.view(box.dtype).view(box.shape).copy_(box)
        return buffer

    def _lend(self, size: int, lent: list[memoryview]) -> Tensor:
        memory = self._arena.lend(size)
        if memory is None:  # more than one item that is larger than the window
            return torch.empty(size, dtype=torch.uint8)
        lent.append(memory)
        return torch.frombuffer(memory, dtype=torch.uint8, count=size)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _pieces(parcel: Parcel, buffer: Tensor) -> list[Tensor]:
    """The bytes of each box."""
    return [buffer[begin : begin + size] for begin, size in parcel.places]
