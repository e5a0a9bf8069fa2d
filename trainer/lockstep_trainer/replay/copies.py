"""Whether ranks that must hold the same parameters do. Pure.

With copies of the shards (HSDP), a bit that flips in one copy, in memory or in the optimizer's update, makes the units
of that copy compute with other weights than the rest. Comparing computations would then blame whoever is next to them
along the ring, so parameters come first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from lockstep_trainer.parallel.layout import Coordinates
from lockstep_trainer.replay.compare import Verdict
from lockstep_trainer.replay.points import Point
from lockstep_trainer.replay.units import Units


def judge_copies(units: Units, digests: Sequence[int]) -> tuple[Verdict, ...]:
    """Verdicts from a digest of each rank's own shards, by rank; none where all copies agree.

    More than half of a shard's copies outvote the rest, which are named one by one. Where nowhere so many agree, one
    verdict says which ranks' copies differ.
    """
    layout, holders = units.layout, defaultdict[Coordinates, list[int]](list)
    for rank in range(layout.world_size):
        holders[replace(layout.coordinates(rank), replicate=0)].append(rank)
    wrong: list[int] = []
    doubted: list[int] = []
    for ranks in holders.values():
        ((digest, agree),) = Counter(digests[rank] for rank in ranks).most_common(1)
        if agree == len(ranks):
            continue
        if 2 * agree > len(ranks):
            wrong += [rank for rank in ranks if digests[rank] != digest]
        else:
            doubted += ranks
    if wrong:
        return tuple(_verdict(units, rank) for rank in sorted(wrong))
    if not doubted:
        return ()
    either = tuple(sorted(doubted))
    evidence = f"the copies of parameters on ranks {', '.join(map(str, either))} differ and no more than half agree"
    return (Verdict("undecided", None, either, _point(units, either[0]), 0.0, evidence),)


def _verdict(units: Units, rank: int) -> Verdict:
    evidence = f"rank {rank} holds other parameters than the other copies of its shard"
    return Verdict("permanent", units.unit(rank), (rank,), _point(units, rank), 1.0, evidence)


def _point(units: Units, rank: int) -> Point:
    return Point(units.first_stage(rank), "forward", "parameters", local=True)
