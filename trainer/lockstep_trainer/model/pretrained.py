"""Start from a Hugging Face checkpoint: config.json and *.safetensors in a folder or on S3.

Every rank reads the rows of its own shards, in ranges of at most 64 MiB, and never more than its shards are large in
memory. Columns are cut off after reading; ranks that hold copies each read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.agreement import by_first
from lockstep_trainer.errors import NotFound, StoreError, UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.files import CONFIG, INDEX, SINGLE
from lockstep_trainer.model.huggingface import FAMILIES, Counterpart, Family, counterparts, from_json
from lockstep_trainer.model.safetensors import Stored, read_header
from lockstep_trainer.parallel.sharded import local_shard, own_shard
from lockstep_trainer.storage import ObjectStore

_RANGE_BYTES = 64 * 2**20


def read_config(store: ObjectStore) -> DecoderConfig:
    """The architecture of the checkpoint; raises UserError where it can't be trained."""
    return from_json(_config_json(store), _where(store, CONFIG))


def load_weights(
    state: Mapping[str, Tensor], config: DecoderConfig, store: ObjectStore, *, group: dist.ProcessGroup | None = None
) -> None:
    """Fill ``state``, this rank's part of the training state by name, from the checkpoint.

    Names are the decoder's, of parameters and persistent buffers; DTensors get their shards, at any layout. The ranks
    of ``group``, which must be gloo, share one reading of the files' headers; without it there is no communication.
    Raises UserError where a tensor is missing, has another shape, or would be left out.
    """

    def look() -> tuple[Family, dict[str, Stored]]:
        return FAMILIES[_config_json(store)["architectures"][0]], _stored(store)

    of, stored = look() if group is None else by_first(look, group)
    known = counterparts(config, of)
    _check_complete(config, known, stored, store)
    by_name = {counterpart.name: counterpart for counterpart in known}
    with torch.no_grad():
        for name, tensor in state.items():
            if name in by_name:
                _fill(tensor, by_name[name], stored, store)
            elif name.endswith(".router_bias"):  # the family has none
                tensor.zero_()
            else:
                raise UserError(f"trainer.model.initFrom: {store.uri} has nothing for the model's {name}")


# --- what is there ---------------------------------------------------------------------------------------------------


def _where(store: ObjectStore, key: str) -> str:
    return f"trainer.model.initFrom: {store.uri}/{key}"


def _config_json(store: ObjectStore) -> dict[str, Any]:
    try:
        found = json.loads(store.get(CONFIG)[0])
    except NotFound:
        raise UserError(f"{_where(store, 'config.json')} is missing; name a folder in Hugging Face's format") from None
    except ValueError as error:
        raise UserError(f"{_where(store, 'config.json')} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{_where(store, 'config.json')} holds no object")
    return found


def _stored(store: ObjectStore) -> dict[str, Stored]:
    """All tensors of the checkpoint by name. As in `transformers`, one file counts more than the index of several."""
    refused = None
    try:
        return read_header(store, SINGLE)
    except NotFound:
        pass
    except StoreError as error:  # S3 denies what is not there to those who may not list
        if error.temporary:
            raise
        refused = error
    try:
        files = sorted(set(json.loads(store.get(INDEX)[0])["weight_map"].values()))
    except NotFound:
        raise refused or UserError(f"{_where(store, SINGLE)} is missing") from None
    except StoreError as error:
        if error.temporary or refused is None:
            raise
        raise refused from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{_where(store, INDEX)} can't be read: {error}") from None
    found: dict[str, Stored] = {}
    for key in files:
        try:
            found.update(read_header(store, key))
        except NotFound:
            raise UserError(f"{_where(store, key)} is missing") from None
    return found


def _check_complete(
    config: DecoderConfig, known: tuple[Counterpart, ...], stored: Mapping[str, Stored], store: ObjectStore
) -> None:
    for counterpart in known:
        shape = counterpart.shape[1:] if counterpart.stacked else counterpart.shape
        for name in counterpart.theirs:
            if name not in stored:
                raise UserError(f"{_where(store, name)} is missing, which the architecture needs")
            if stored[name].shape != shape:
                raise UserError(f"{_where(store, name)} has the shape {stored[name].shape} instead of {shape}")
    left = set(stored) - {name for counterpart in known for name in counterpart.theirs}
    # Some checkpoints repeat a tied head, and old ones hold what is computed from the configuration.
    left -= {name for name in left if name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        left.discard("lm_head.weight")
    if left:
        names = ", ".join(sorted(left)[:3])
        raise UserError(
            f"trainer.model.initFrom: {store.uri} has {len(left)} tensors that the architecture has no place "
            f"for: {names}"
        )


# --- reading ---------------------------------------------------------------------------------------------------------


def _fill(tensor: Tensor, counterpart: Counterpart, stored: Mapping[str, Stored], store: ObjectStore) -> None:
    """Read this rank's part of ``tensor``."""
    starts, shape = _own_region(tensor, counterpart.shape)
    target = local_shard(tensor)
    if not counterpart.stacked:
        _read(target, stored[counterpart.theirs[0]], starts, store)
        return
    for number in range(shape[0]):
        _read(target[number], stored[counterpart.theirs[starts[0] + number]], starts[1:], store)


def _own_region(tensor: Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this rank's part of ``tensor`` begins in each dimension, and its shape."""
    part = own_shard(torch.empty(shape, device="meta"), tensor)
    if part.numel() == 0:
        return (0,) * len(shape), tuple(part.shape)
    starts, rest = [], int(part.storage_offset())
    for stride in part.stride():  # those of the whole, which has no gaps
        start, rest = divmod(rest, stride)
        starts.append(start)
    return tuple(starts), tuple(part.shape)


def _read(target: Tensor, source: Stored, starts: tuple[int, ...], store: ObjectStore) -> None:
    """Fill ``target`` with the part of ``source`` that begins at ``starts``."""
    if target.numel() == 0:
        return
    rows = max(1, _RANGE_BYTES // source.row_bytes)
    for first in range(0, target.shape[0], rows):
        count = min(rows, target.shape[0] - first)
        size = count * source.row_bytes
        data = store.get_range(source.key, source.offset + (starts[0] + first) * source.row_bytes, size)
        if len(data) != size:
            raise UserError(f"{_where(store, source.key)} ends too early; fetch it again")
        piece = torch.frombuffer(bytearray(data), dtype=source.dtype).view(count, *source.shape[1:])
        for dim in range(1, target.dim()):
            piece = piece.narrow(dim, starts[dim], target.shape[dim])
        target[first : first + count].copy_(piece)
