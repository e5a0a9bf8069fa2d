"""Units of ring replay: which ranks replay which ranks' work. Plain arithmetic on the layout, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lockstep_trainer.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a layout, in a ring.

    A unit is the smallest set of ranks that hand each other activations and no one else: a data-parallel coordinate
    with its tensor, pipeline and context ranks; as many of them as an expert group spans where experts are folded over
    data.
    """

    layout: Layout

    @property
    def width(self) -> int:
        """Data-parallel coordinates of a unit."""
        inner = self.layout.context * self.layout.tensor
        return math.lcm(inner, self.layout.expert) // inner

    @property
    def number(self) -> int:
        """How many units there are."""
        return self.layout.data_width // self.width

    @property
    def outvote(self) -> bool:
        """There are enough of them that two which agree outvote a third."""
        return self.number >= 3

    def unit(self, rank: int) -> int:
        """The unit of ``rank``."""
        return self.layout.data_rank(rank) // self.width

    def ranks(self, unit: int) -> tuple[int, ...]:
        """The ranks of a unit, in order."""
        return tuple(rank for rank in range(self.layout.world_size) if self.unit(rank) == unit)

    def first_stage(self, rank: int) -> int:
        """The first stage of the pipeline that ``rank`` holds."""
        return self.layout.stages_of(self.layout.coordinates(rank).pipeline)[0]

    def counterpart(self, rank: int, distance: int) -> int:
        """The rank with the same place in the unit that is ``distance`` further along the ring."""
        layout, at = self.layout, self.layout.coordinates(rank)
        unit, within = divmod(layout.data_rank(rank), self.width)
        data = (unit + distance) % self.number * self.width + within
        replicate, shard = divmod(data, layout.shard)
        outer = (at.pipeline * layout.replicate + replicate) * layout.shard + shard
        return (outer * layout.context + at.context) * layout.tensor + at.tensor

    def on_stage(self, unit: int, stage: int) -> tuple[int, ...]:
        """The ranks of a unit that hold a stage of the pipeline."""
        layout = self.layout
        return tuple(rank for rank in self.ranks(unit) if stage in layout.stages_of(layout.coordinates(rank).pipeline))
