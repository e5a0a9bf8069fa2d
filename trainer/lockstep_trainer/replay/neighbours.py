"""How a rank reaches its counterparts in the other units of the ring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.replay.units import Units


class Neighbours:
    """One rank's; all ranks call the same methods in the same order."""

    def __init__(self, units: Units, rank: int, device: torch.device) -> None:
        self.units, self._rank, self.device = units, rank, device

    def shift(self, tensor: Tensor, distance: int) -> Tensor:
        """Each rank's tensor to its counterpart ``distance`` units on; what came from as far back. All of one shape."""
        if distance % self.units.number == 0:
            return tensor
        sent = tensor.to(self.device)
        received = self.exchange(sent, sent.shape, distance, like=sent)
        assert received is not None
        return received.to(tensor.device)

    def exchange(
        self, mine: Tensor | None, shape: Sequence[int] | None, distance: int, *, like: Tensor
    ) -> Tensor | None:
        """``mine`` to the counterpart ``distance`` units on, which asks for its shape; what comes from as far back, of
        ``shape``, and of the type of ``like``. None where nothing goes that way, or comes."""
        if distance % self.units.number == 0:
            return mine
        received = None if shape is None else torch.empty(shape, dtype=like.dtype, device=self.device)
        operations = []
        if mine is not None:
            to = self.units.counterpart(self._rank, distance)
            operations.append(dist.P2POp(dist.isend, mine.contiguous(), to))
        if received is not None:
            operations.append(dist.P2POp(dist.irecv, received, self.units.counterpart(self._rank, -distance)))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return received
