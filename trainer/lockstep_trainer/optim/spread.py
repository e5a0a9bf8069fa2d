"""Work on whole matrices that are sharded: each rank gathers its share of them, and hands the results back.

A matrix travels one mesh axis at a time. On each axis the ranks divide the matrices at hand among them, and every rank
sends its pieces to their owners in one all-to-all; behind the last axis a matrix is whole on one rank. The results go
the same way back. Each rank sends and receives about as many bytes as it holds, and the work is divided by the number
of ranks that share the matrices. Only the groups of the mesh are used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Work = Callable[[Tensor], Tensor]
"""(matrices, rows, columns) → the same shape; each matrix on its own."""

WHOLE_ELEMENTS = 2**27
"""Elements that are worked on at once: bounds what the work needs for its intermediate results."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One axis over which a matrix is cut."""

    axis: int  # of the mesh
    dim: int  # of the matrix: 0 rows, 1 columns
    extent: int  # rows or columns before the cut


@dataclass(frozen=True, slots=True)
class Way:
    """Where a sharded parameter's matrices become whole: axes in the order in which they are joined."""

    mesh: DeviceMesh | None
    hops: tuple[Hop, ...]

    @property
    def family(self) -> tuple[DeviceMesh | None, tuple[int, ...]]:
        """What matrices that travel together have in common."""
        return self.mesh, tuple(hop.axis for hop in self.hops)


@dataclass(slots=True)
class _Piece:
    """What a rank holds of some matrices of one parameter, (matrices, rows, columns)."""

    block: Tensor
    way: Way


def way_of(parameter: Tensor) -> Way:
    """How ``parameter``, (rows, columns) or (matrices, rows, columns), is cut.

    What cuts the first dimension of a stack leaves its matrices whole, and copies are no cut. FSDP cuts what tensor and
    expert parallelism left, though its axis stands before theirs: torch calls that a strided shard. Raises ValueError
    where the local shard is not what this rule gives.
    """
    if not isinstance(parameter, DTensor):
        return Way(None, ())
    mesh, placements, stack = parameter.device_mesh, parameter.placements, parameter.ndim - 2
    cuts = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    # In the order in which they were cut: torch's plain shards, left to right, then the strided ones.
    cuts.sort(key=lambda axis: (type(placements[axis]).__name__ == "_StridedShard", axis))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    shape, hops = list(parameter.shape), []
    for axis in cuts:
        dim: int = placements[axis].dim  # type: ignore[attr-defined]  # not of Placement, but of all that are left
        if dim >= stack:
            hops.append(Hop(axis, dim - stack, shape[dim]))
        shape[dim] = _sizes(shape[dim], mesh.size(axis))[coordinate[axis]]
    local = parameter.to_local().shape
    if list(local) != shape:
        raise ValueError(f"a shard of {tuple(local)} of {tuple(parameter.shape)} under {placements} is not understood")
    hops.reverse()  # the last cut is joined first
    if len({hop.dim for hop in hops}) == len(hops):
        hops.sort(key=lambda hop: hop.axis)  # any order will do: take the one that most parameters share
    return Way(mesh, tuple(hops))


def on_whole(shards: Sequence[Tensor], ways: Sequence[Way], work: Work) -> list[Tensor]:
    """Do ``work`` on whole matrices; all ranks that share one of them call this with the same list.

    ``shards`` are local ones, (rows, columns) or (matrices, rows, columns), and so are the results.
    """
    families: dict[object, list[int]] = defaultdict(list)
    for number, way in enumerate(ways):
        families[way.family].append(number)
    results: list[Tensor | None] = [None] * len(shards)
    for members in families.values():
        pieces = [_Piece(_stack(shards[number]), ways[number]) for number in members]
        for number, block in zip(members, _joined(pieces, 0, work), strict=True):
            results[number] = block.view_as(shards[number])
    return [result for result in results if result is not None]


def _stack(shard: Tensor) -> Tensor:
    return shard if shard.ndim == 3 else shard.unsqueeze(0)


def _joined(pieces: list[_Piece], depth: int, work: Work) -> list[Tensor]:
    """Results for ``pieces``, which are joined over their first ``depth`` axes already, in the same order."""
    if not pieces or depth == len(pieces[0].way.hops):
        return _by_shape([piece.block for piece in pieces], work)
    way = pieces[0].way
    assert way.mesh is not None
    axis = way.hops[depth].axis
    group, ranks, own = way.mesh.get_group(axis), way.mesh.size(axis), way.mesh.get_local_rank(axis)
    if ranks == 1:
        return _joined(pieces, depth + 1, work)
    portions = [portion for piece in pieces for portion in _portions(piece, ranks)]
    owners = _owners([_whole_cost(portion, portion.way.hops[depth:]) for portion in portions], ranks)
    mine = [portion for portion, owner in zip(portions, owners, strict=True) if owner == own]
    sizes = [_sizes(portion.way.hops[depth].extent, ranks) for portion in mine]

    # Out: this rank's pieces of the others' matrices. In: the others' pieces of its own.
    sent = [[p.block for p, owner in zip(portions, owners, strict=True) if owner == rank] for rank in range(ranks)]
    shapes = [[_cut(p, depth, size[rank]) for p, size in zip(mine, sizes, strict=True)] for rank in range(ranks)]
    received = _exchange(sent, shapes, group, pieces[0].block)
    whole = [
        _Piece(torch.cat(parts, dim=1 + portion.way.hops[depth].dim), portion.way)
        for portion, *parts in zip(mine, *received, strict=True)
    ]
    done = _joined(whole, depth + 1, work)

    # The same way back.
    cut = [
        torch.split(block, size, dim=1 + portion.way.hops[depth].dim)
        for block, portion, size in zip(done, mine, sizes, strict=True)
    ]
    sent = [[parts[rank] for parts in cut] for rank in range(ranks)]
    shapes = [
        [tuple(p.block.shape) for p, owner in zip(portions, owners, strict=True) if owner == rank]
        for rank in range(ranks)
    ]
    returned = [iter(blocks) for blocks in _exchange(sent, shapes, group, pieces[0].block)]
    results = iter([next(returned[owner]) for owner in owners])
    return [
        torch.cat([next(results) for _ in range(_portion_count(piece, ranks))]) for piece in pieces
    ]  # fmt: skip


def _portions(piece: _Piece, ranks: int) -> list[_Piece]:
    """A stack of matrices in as many parts as ranks can work on."""
    return [_Piece(block, piece.way) for block in piece.block.tensor_split(_portion_count(piece, ranks))]


def _portion_count(piece: _Piece, ranks: int) -> int:
    return max(1, min(ranks, piece.block.shape[0]))


def _whole_cost(piece: _Piece, hops: Sequence[Hop]) -> int:
    """Multiplications of one product of whole matrices with their transpose, the same on all ranks."""
    matrices, *sides = piece.block.shape
    for hop in hops:
        sides[hop.dim] = hop.extent
    return matrices * sides[0] * sides[1] * min(sides)


def _owners(costs: Sequence[int], ranks: int) -> list[int]:
    """A rank for each piece of work: the largest first, each to the rank with least to do (Graham 1969)."""
    load, owners = [0] * ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        owner = load.index(min(load))
        owners[number] = owner
        load[owner] += costs[number]
    return owners


def _sizes(extent: int, parts: int) -> list[int]:
    """Sizes of the parts as ``torch.chunk`` cuts them; the last ones may be empty."""
    size = -(-extent // parts)
    return [max(0, min(size, extent - part * size)) for part in range(parts)]


def _cut(piece: _Piece, depth: int, size: int) -> tuple[int, ...]:
    shape = list(piece.block.shape)
    shape[1 + piece.way.hops[depth].dim] = size
    return tuple(shape)


def _exchange(
    sent: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    group: dist.ProcessGroup,
    like: Tensor,
) -> list[list[Tensor]]:
    """Send ``sent[rank]`` to each rank of the group; returns what came from each, of ``shapes[rank]``."""
    flat = [block.reshape(-1) for blocks in sent for block in blocks]
    outgoing = torch.cat(flat) if flat else like.new_empty(0)
    counts = [[torch.Size(shape).numel() for shape in each] for each in shapes]
    incoming = like.new_empty(sum(map(sum, counts)))
    dist.all_to_all_single(
        incoming,
        outgoing,
        [sum(each) for each in counts],
        [sum(block.numel() for block in blocks) for blocks in sent],
        group=group,
    )
    ends = iter(accumulate(count for each in counts for count in each))
    return [
        [
            incoming[end - count : end].view(shape)
            for shape, count in zip(each_shape, each_count, strict=True)
            for end in [next(ends)]
        ]
        for each_shape, each_count in zip(shapes, counts, strict=True)
    ]


def _by_shape(blocks: Sequence[Tensor], work: Work) -> list[Tensor]:
    """``work`` on (matrices, rows, columns) blocks, those of one shape together."""
    shapes: dict[torch.Size, list[int]] = defaultdict(list)
    for number, block in enumerate(blocks):
        shapes[block.shape[1:]].append(number)
    results: list[Tensor] = list(blocks)
    for shape, members in shapes.items():
        together = torch.cat([blocks[number] for number in members])
        at_once = max(1, WHOLE_ELEMENTS // max(1, shape.numel()))
        done = torch.cat([work(part) for part in torch.split(together, at_once)]) if together.numel() else together
        for number, block in zip(members, torch.split(done, [blocks[n].shape[0] for n in members]), strict=True):
            results[number] = block
    return results
