"""What this rank needs of a checkpoint, and where it goes: its local shards against the shards as they were written."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor

from lockstep_trainer.checkpoint.fetch import Box, Item, Want
from lockstep_trainer.errors import Corrupt, UserError

_A_ROW_PER_TOKEN = re.compile(r"(^|\.)(embedding|head)\.weight(\.|$)")

Targets = Mapping[int, Mapping[Box, Sequence[Tensor]]]
"""Where this rank wants boxes of items, by the item's number: views of the live state, each in the box's shape and the
item's dtype."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of an item, and its place in the live state."""

    want: Want
    target: Tensor  # a view of the local shard, in the box's shape


class Contents:
    """A checkpoint's ``.metadata``, with a number for each item, the same on all ranks. ``where`` names it."""

    def __init__(self, metadata: Metadata, where: str) -> None:
        self._tensors = metadata.state_dict_metadata
        self._places: dict[MetadataIndex, Any] = metadata.storage_data or {}
        self._indices = list(self._places)
        self._numbers = {index: number for number, index in enumerate(self._indices)}
        self.where = where

    def tensor(self, name: str, own: Tensor) -> TensorStorageMetadata:
        """What is known of the tensor ``name``; raises UserError where ``own`` can't be filled from it."""
        found = self._tensors.get(name)
        remedy = (
            f"set {_field(name, found, own)} back to what it was when the checkpoint was written, or start a new job"
        )
        if not isinstance(found, TensorStorageMetadata):
            has = "has no" if found is None else "has no tensor"
            raise UserError(f"{self.where} {has} {name}, which this job's state has with shape {_text(own)}; {remedy}")
        if found.size != own.shape:
            raise UserError(
                f"{self.where} has {name} with shape {list(found.size)}, and this job's state has it with shape "
                f"{_text(own)}; {remedy}"
            )
        if found.properties.dtype != own.dtype:
            raise UserError(
                f"{self.where} has {name} {_text(own)} in {_name(found.properties.dtype)}, and this job's state has it "
                f"in {_name(own.dtype)}; {remedy}"
            )
        return found

    def number(self, index: MetadataIndex) -> int:
        """The number of a written shard; raises Corrupt where nothing says in which file it lies."""
        try:
            return self._numbers[index]
        except KeyError:
            raise Corrupt(f"{self.where} does not say where {index.fqn} at {list(index.offset or ())} lies") from None

    def items(self, numbers: Collection[int]) -> dict[int, Item]:
        """The items with these numbers; raises Corrupt where a shard is not among its tensor's."""
        shapes: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
        found = {}
        for number in sorted(numbers):
            index, place = self._indices[number], self._places[self._indices[number]]
            tensor = self._tensors[index.fqn]
            assert isinstance(tensor, TensorStorageMetadata)  # `tensor` refuses any other
            if index.fqn not in shapes:
                shapes[index.fqn] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in tensor.chunks}
            shape = shapes[index.fqn].get(tuple(index.offset or ()))
            if shape is None:
                raise Corrupt(f"{self.where} has no shard of {index.fqn} at {list(index.offset or ())}")
            found[number] = Item(place.relative_path, place.offset, place.length, tensor.properties.dtype, shape)
        return found

    def strangers(self, numbers: Collection[int]) -> list[str]:
        """Names that none of the items with these numbers belongs to."""
        known = {self._indices[number].fqn for number in numbers}
        return sorted(name for name in self._tensors if name not in known)


def pieces_of(state: Mapping[str, Any], contents: Contents) -> list[Piece]:
    """All that this rank's ``state`` consists of.

    Raises UserError where the checkpoint does not have it in this shape and dtype, Corrupt where it contradicts itself.
    """
    tensors = dict(named(state))
    pieces = []
    places = _Places()
    for name, tensor in tensors.items():
        metadata = contents.tensor(name, tensor)
        chunks = places.of(tensor)
        own = sum(math.prod(chunk.sizes) for chunk in chunks)
        if len(chunks) == 1 and chunks[0] in metadata.chunks:  # as it was written: nothing to work out
            whole = (0,) * tensor.dim(), tuple(chunks[0].sizes)
            if own:
                number = contents.number(MetadataIndex(name, chunks[0].offsets))
                pieces.append(Piece((number, whole), local(tensor)))
            continue
        covered = 0
        for read in create_read_items_for_chunk_list(name, metadata, chunks):
            if not math.prod(read.lengths):
                continue
            target = find_state_dict_object(tensors, read.dest_index).detach()
            for dim, (offset, length) in enumerate(zip(read.dest_offsets, read.lengths, strict=True)):
                target = target.narrow(dim, offset, length)
            box = tuple(read.storage_offsets), tuple(read.lengths)
            pieces.append(Piece((contents.number(read.storage_index), box), target))
            covered += target.numel()
        if covered != own:
            raise Corrupt(f"{contents.where} has {covered} of the {own} numbers of {name} that are needed here")
    return pieces


def targets_of(pieces: Iterable[Piece]) -> Targets:
    """The pieces by item and box."""
    found: dict[int, dict[Box, list[Tensor]]] = {}
    for piece in pieces:
        number, box = piece.want
        found.setdefault(number, {}).setdefault(box, []).append(piece.target)
    return found


def cut(tensor: Tensor, box: Box) -> Tensor:
    """The part of an item's tensor that ``box`` names; a view."""
    for dim, (offset, length) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def named(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts under torch's names: the keys, joined by dots. Raises UserError for anything else."""
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from named(value, f"{name}.")
        else:
            raise UserError(f"{name} in the training state is a {type(value).__name__}; a state has tensors only")


class _Places:
    """The global places of what this rank has of tensors; a parameter's and those of its optimizer's are the same."""

    def __init__(self) -> None:
        self._known: dict[Any, list[ChunkStorageMetadata]] = {}

    def of(self, tensor: Tensor) -> list[ChunkStorageMetadata]:
        """Of this one."""
        if not isinstance(tensor, DTensor):
            return [ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)]
        if tensor.device_mesh.get_coordinate() is None:
            return []
        key = tensor.device_mesh, tensor.placements, tensor.shape
        if key not in self._known:
            self._known[key] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return self._known[key]


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _field(name: str, found: object, own: Tensor) -> str:
    """What decides whether and in which shape the state has the tensor ``name``."""
    more_or_fewer = isinstance(found, TensorStorageMetadata) and found.size[1:] == own.shape[1:]
    if more_or_fewer and _A_ROW_PER_TOKEN.search(name):
        return "trainer.tokenizer, whose tokens have a row each, or trainer.model"
    return "trainer.recipe.optimizer" if name.startswith("optimizer.") else "trainer.model"


def _text(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
