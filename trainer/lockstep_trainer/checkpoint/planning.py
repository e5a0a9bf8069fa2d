"""How the ranks agree, once in a generation, on what their snapshots look like.

Every rank says what pieces it has and how large they are when saved; rank 0 decides who writes what and makes torch's
``.metadata`` from it; each rank gets its part. Later snapshots take no planning and no collective.
"""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import (
    _validate_global_plan,
    create_default_global_save_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from lockstep_trainer.agreement import by_first
from lockstep_trainer.checkpoint.pieces import local, named
from lockstep_trainer.checkpoint.plan import Archive, Item, Packed, Plan, PlannedFile, aligned, pack, spread
from lockstep_trainer.errors import TrainerError, UserError


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the numbers in a file of ``torch.save``."""

    head: bytes
    tail: bytes

    def archive(self, size: int) -> Archive:
        """Of a tensor with ``size`` bytes of numbers."""
        return Archive(len(self.head) + size + len(self.tail), len(self.head), size)


@dataclass(frozen=True, slots=True)
class Planned:
    """A rank's plan, and how to follow it."""

    plan: Plan
    frames: tuple[Frame | None, ...]  # by item; None for the local ones
    indices: tuple[MetadataIndex, ...]  # by item: where in the state the piece is found
    metadata: bytes | None  # rank 0's ``.metadata``

    def sources(self, state: Mapping[str, Any]) -> list[Tensor]:
        """The tensors to copy, by item; ``state`` has the names and shapes of the one that was planned with."""
        # Training stands still for this: of each tensor only what this rank has of it is looked at.
        flat = dict(named(state))
        return [local(flat[index.fqn]) for index in self.indices]


def plan_snapshots(
    state: Mapping[str, Any], layout: Mapping[str, int], *, rank: int, group: dist.ProcessGroup | None
) -> Planned:
    """Plan together with all ranks of ``group`` (gloo); ``layout`` goes into the plan as it is.

    ``state`` is what ``training_state`` returns. Raises UserError where something in it is no tensor, TrainerError
    where the ranks' parts do not make whole tensors.
    """
    flat, names = flatten_state_dict(dict(state))
    for name, value in flat.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{name} is a {type(value).__name__}; what an optimizer keeps must be tensors, so that it can be "
                "copied while training goes on: torch.tensor(value) is one"
            )
    frames: dict[tuple[torch.dtype, tuple[int, ...]], Frame] = {}
    pieces = []
    for write in create_default_local_save_plan(flat, True).items:
        if _is_empty(write):
            continue
        chunk = _chunk(write)
        if chunk not in frames:
            frames[chunk] = make_frame(*chunk)
        pieces.append(_Piece(write, chunk, frames[chunk].archive(_bytes(*chunk))))

    size = dist.get_world_size(group)
    offers: list[Any] = [None] * size
    offer = ([piece.write for piece in pieces], [piece.archive for piece in pieces], names)
    dist.gather_object(offer, offers if rank == 0 else None, group=group, group_dst=0)
    decided: list[Any] = [None] * size
    metadata: bytes | None = None

    def decide() -> None:
        nonlocal decided, metadata
        decided, metadata = _decide(offers)

    by_first(decide, group)
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, decided if rank == 0 else None, group=group, group_src=0)
    files, places = mine[0]
    found = _assemble(pieces, files, places)
    return Planned(
        Plan(rank, size, dict(layout), files, found.items, found.size, metadata=rank == 0),
        tuple(
            frames[pieces[piece].chunk] if item.file is not None else None
            for item, piece in zip(found.items, found.order, strict=True)
        ),
        tuple(pieces[piece].write.index for piece in found.order),
        metadata,
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """One of the rank's pieces."""

    write: WriteItem
    chunk: tuple[torch.dtype, tuple[int, ...]]
    archive: Archive


@dataclass(frozen=True, slots=True)
class _Assembled:
    items: tuple[Item, ...]
    order: list[int]  # the piece of each item
    size: int  # bytes of the buffer


def _decide(offers: list[Any]) -> tuple[list[Any], bytes]:
    """Each rank's files and places, and ``.metadata``."""
    chosen = spread(
        [
            [(write.index, archive.length) for write, archive in zip(writes, archives, strict=True)]
            for writes, archives, _ in offers
        ]
    )
    packed = [pack(rank, numbers, offers[rank][1]) for rank, numbers in enumerate(chosen)]
    plans = [SavePlan([offers[rank][0][place.piece] for place in places]) for rank, (_, places) in enumerate(packed)]
    plans, metadata = create_default_global_save_plan(plans)
    if problems := _problems(plans, metadata):
        raise TrainerError(f"the ranks' parts of the state do not fit together: {problems[:500]}")
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for rank, (files, places) in enumerate(packed):
        for write, place in zip(plans[rank].items, places, strict=True):
            file, archive = files[place.file], offers[rank][1][place.piece]
            storage[write.index] = _StorageInfo(file.name, place.offset - file.offset, archive.length)
    merged: dict[str, Any] = {}
    for _, _, names in reversed(offers):
        merged |= names
    whole = dataclasses.replace(
        metadata,
        planner_data=merged,
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    return packed, pickle.dumps(whole)


def _problems(plans: list[SavePlan], metadata: Metadata) -> str:
    """What is wrong with a plan, in torch's words; empty where nothing is."""
    found: Any = _validate_global_plan(plans, metadata)
    if isinstance(found, bool):  # torch before 2.15 says only whether it is right, and logs the rest
        return "" if found else "see the log above"
    return "; ".join(map(str, found))


def _assemble(pieces: list[_Piece], files: tuple[PlannedFile, ...], places: tuple[Packed, ...]) -> _Assembled:
    """The rank's items, those in files first, and the numbers of their pieces."""
    items: list[Item] = []

    def add(piece: _Piece, file: int | None, offset: int, length: int, data: int) -> None:
        index, (dtype, shape) = piece.write.index, piece.chunk
        start = tuple(index.offset) if index.offset is not None else (0,) * len(shape)
        name = str(dtype).removeprefix("torch.")
        items.append(Item(index.fqn, file, offset, length, data, piece.archive.bytes, name, shape, start))

    for place in places:
        piece = pieces[place.piece]
        add(piece, place.file, place.offset, piece.archive.length, place.offset + piece.archive.data)
    end = max((file.offset + file.size for file in files), default=0)
    elsewhere = sorted(set(range(len(pieces))) - {place.piece for place in places})
    for number in elsewhere:
        offset = aligned(end)
        add(pieces[number], None, offset, pieces[number].archive.bytes, offset)
        end = offset + pieces[number].archive.bytes
    return _Assembled(tuple(items), [place.piece for place in places] + elsewhere, max(end, 1))


@lru_cache(maxsize=4096)
def make_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
    """What ``torch.save`` writes around the numbers of such a tensor.

    Without a CRC-32 of the numbers, which torch does not look at when it loads: every save has others.
    """
    checked = get_crc32_options()
    with tempfile.NamedTemporaryFile(prefix="frame-") as file:
        set_crc32_options(False)
        try:
            with skip_data():  # the file gets a hole where the numbers would be
                torch.save(torch.empty(shape, dtype=dtype), file.name)
        finally:
            set_crc32_options(checked)
        begin = torch._C.PyTorchFileReader(file.name).get_record_offset("data/0")  # type: ignore[attr-defined]
        head = file.read(begin)
        file.seek(begin + _bytes(dtype, shape))
        return Frame(head, file.read())


def _chunk(write: WriteItem) -> tuple[torch.dtype, tuple[int, ...]]:
    assert write.tensor_data is not None
    return write.tensor_data.properties.dtype, tuple(write.tensor_data.chunk.sizes)


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _is_empty(write: WriteItem) -> bool:
    """A rank's share of a tensor with fewer rows than ranks. The tensor as a whole has something."""
    return _bytes(*_chunk(write)) == 0 and write.tensor_data.size.numel() > 0  # type: ignore[union-attr]
