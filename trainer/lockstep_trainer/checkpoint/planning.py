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
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from lockstep_trainer.agreement import by_first
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
        flat, _ = flatten_state_dict(dict(state))
        return [find_state_dict_object(flat, index).detach() for index in self.indices]


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
    writes = [write for write in create_default_local_save_plan(flat, True).items if not _is_empty(write)]
    shapes = [_chunk(write) for write in writes]
    frames: dict[tuple[torch.dtype, tuple[int, ...]], Frame] = {}
    own_frames = [frames.get(shape) or frames.setdefault(shape, make_frame(*shape)) for shape in shapes]
    archives = [frame.archive(_bytes(*shape)) for frame, shape in zip(own_frames, shapes, strict=True)]

    size = dist.get_world_size(group)
    offers: list[Any] = [None] * size
    dist.gather_object((writes, archives, names), offers if rank == 0 else None, group=group, group_dst=0)
    decided: list[Any] = [None] * size
    metadata: bytes | None = None

    def decide() -> None:
        nonlocal decided, metadata
        decided, metadata = _decide(offers)

    by_first(decide, group)
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, decided if rank == 0 else None, group=group, group_src=0)
    files, places = mine[0]
    plan, order = _assemble(rank, size, layout, writes, archives, files, places, shapes)
    written = len(places)
    return Planned(
        plan,
        tuple(own_frames[piece] if number < written else None for number, piece in enumerate(order)),
        tuple(writes[piece].index for piece in order),
        metadata,
    )


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
    if problems := _validate_global_plan(plans, metadata):
        raise TrainerError(f"the ranks' parts of the state do not fit together: {'; '.join(map(str, problems))[:500]}")
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


def _assemble(
    rank: int,
    size: int,
    layout: Mapping[str, int],
    writes: list[WriteItem],
    archives: list[Archive],
    files: tuple[PlannedFile, ...],
    places: tuple[Packed, ...],
    shapes: list[tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[Plan, list[int]]:
    """The rank's plan, and the numbers of its pieces in the order of the items."""
    items: list[Item] = []

    def add(piece: int, file: int | None, offset: int, length: int, data: int) -> None:
        dtype, shape = shapes[piece]
        write = writes[piece]
        start = tuple(write.index.offset) if write.index.offset is not None else (0,) * len(shape)
        name = str(dtype).removeprefix("torch.")
        items.append(Item(write.index.fqn, file, offset, length, data, archives[piece].bytes, name, shape, start))

    for place in places:
        archive = archives[place.piece]
        add(place.piece, place.file, place.offset, archive.length, place.offset + archive.data)
    end = max((file.offset + file.size for file in files), default=0)
    elsewhere = sorted(set(range(len(writes))) - {place.piece for place in places})
    for piece in elsewhere:
        offset = aligned(end)
        add(piece, None, offset, archives[piece].bytes, offset)
        end = offset + archives[piece].bytes
    plan = Plan(rank, size, dict(layout), files, tuple(items), max(end, 1), rank == 0)
    return plan, [place.piece for place in places] + elsewhere


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
        begin = torch._C.PyTorchFileReader(file.name).get_record_offset("data/0")
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
