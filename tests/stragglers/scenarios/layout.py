"""Who is who in a job: ranks, coordinates, nodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lockstep_trainer.stragglers.work import Place


@dataclass(frozen=True)
class Layout:
    """A job's mesh. Arrays "by rank" have the shape (data, pipeline, tensor), behind one axis for the steps."""

    data: int
    pipeline: int = 1
    tensor: int = 1
    outermost: Literal["data", "pipeline"] = "data"
    """Which coordinate changes last as ranks are counted; ``tensor`` always changes first."""
    micro_batches: int = 4
    sharded: bool = False
    """The data dimension meets in each micro-batch, for parameters, and not only at the step's end. Without pipeline
    stages alone."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data * self.pipeline * self.tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of arrays by rank."""
        return self.data, self.pipeline, self.tensor

    @property
    def name(self) -> str:
        """As it is said: dp4·pp2·tp8."""
        parts = (("dp", self.data), ("pp", self.pipeline), ("tp", self.tensor))
        return "·".join(f"{name}{size}" for name, size in parts if size > 1)

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """Rank by (data, pipeline, tensor)."""
        ranks = np.arange(self.size)
        if self.outermost == "data":
            return ranks.reshape(self.shape)
        return ranks.reshape(self.pipeline, self.data, self.tensor).transpose(1, 0, 2)

    @cached_property
    def coordinates(self) -> list[tuple[int, int, int]]:
        """(data, pipeline, tensor) by rank."""
        where = np.argsort(self.ranks.reshape(-1))
        return [(int(d), int(p), int(t)) for d, p, t in zip(*np.unravel_index(where, self.shape), strict=True)]

    def places(self, nodes: list[str]) -> tuple[Place, ...]:
        """What the detector is told of the ranks; ``nodes`` by rank."""
        return tuple(
            Place(rank, nodes[rank], data=d, pipeline=p, tensor=t) for rank, (d, p, t) in enumerate(self.coordinates)
        )
