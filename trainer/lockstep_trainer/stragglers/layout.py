"""Who is compared with whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lockstep_trainer.stragglers.work import Place

Indices: TypeAlias = NDArray[np.intp]

DIMENSIONS = ("data", "pipeline", "tensor", "context")


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that differ in one dimension of the mesh alone; they meet in its collectives."""

    dimension: str
    stage: int
    members: Indices


@dataclass(frozen=True, slots=True)
class Layout:
    """Places in the order of their ranks; ranks are meant by their index in it everywhere else in the search."""

    places: tuple[Place, ...]
    index: dict[int, int]
    stages: tuple[Indices, ...]
    """Ranks of each pipeline stage: one model of the expected time each."""
    peers: tuple[Indices, ...]
    """Ranks compared with each other: those of a stage; ranks alone in their stages, all of these together."""
    columns: Indices
    """[stages, columns]: ranks that compute the same samples in each stage; no column where there is one stage."""
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, places: Sequence[Place]) -> Layout:
        """From the places of all ranks.

        Raises:
            ValueError: no place, or a rank with two of them.
        """
        ordered = tuple(sorted(places, key=lambda place: place.rank))
        index = {place.rank: at for at, place in enumerate(ordered)}
        if not ordered or len(index) != len(ordered):
            raise ValueError("places: a place is needed for each rank, and one only: give each rank once")
        by_stage: dict[int, list[int]] = defaultdict(list)
        by_column: dict[tuple[int, int, int], dict[int, int]] = defaultdict(dict)
        by_group: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        for at, place in enumerate(ordered):
            by_stage[place.pipeline].append(at)
            by_column[place.data, place.tensor, place.context][place.pipeline] = at
            for dimension in DIMENSIONS:
                rest = tuple(getattr(place, other) for other in DIMENSIONS if other != dimension)
                by_group[dimension, rest].append(at)
        numbers = sorted(by_stage)
        stages = tuple(np.array(by_stage[number]) for number in numbers)
        alone = [int(stage[0]) for stage in stages if len(stage) == 1]
        peers = [stage for stage in stages if len(stage) > 1] + ([np.array(alone)] if alone else [])
        whole = [column for column in by_column.values() if len(column) == len(numbers) > 1]
        columns = np.array([[column[number] for column in whole] for number in numbers], dtype=np.intp)
        groups = tuple(
            Group(dimension, ordered[members[0]].pipeline, np.array(members))
            for (dimension, _), members in sorted(by_group.items())
            if len(members) > 1
        )
        return cls(ordered, index, stages, tuple(peers), columns, groups)

    def peers_of(self, rank: int) -> Indices:
        """The ranks that the rank is compared with, itself among them."""
        return next(group for group in self.peers if rank in group)

    def same_shape(self, other: Layout) -> bool:
        """Each rank does the same work as before; its node may be another."""
        return [(p.rank, p.data, p.pipeline, p.tensor, p.context) for p in self.places] == [
            (p.rank, p.data, p.pipeline, p.tensor, p.context) for p in other.places
        ]
