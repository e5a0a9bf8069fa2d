"""Write the trained model as a folder that `transformers` loads, from shards at any layout.

What an earlier export left in the folder goes first, and config.json is written last: whatever fails in between, no
reader takes what is there for a model.

Tensors are put together one at a time, on the device and in the export's type, by the ranks that share them; files are
dealt out to those ranks, which write at the same time. Memory beside the training state: on each rank the largest
tensor (with experts: all of a layer's matrices of one kind), and on a rank that writes two files, of 1 GiB or one
tensor, whichever is more; while a file is sent, once more its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lockstep_trainer.agreement import by_first, from_all
from lockstep_trainer.data.tokenizer import end_of_text
from lockstep_trainer.errors import TrainerError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.files import (
    CONFIG,
    GENERATION,
    INDEX,
    SINGLE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    clear,
    part,
)
from lockstep_trainer.model.huggingface import Counterpart, counterparts, family, to_json
from lockstep_trainer.model.safetensors import header
from lockstep_trainer.storage import ObjectStore

FILE_BYTES = 2**30
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def export_model(
    state: Mapping[str, Tensor],
    config: DecoderConfig,
    store: ObjectStore,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype = torch.bfloat16,
    file_bytes: int = FILE_BYTES,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the model into ``store``; all ranks of ``group``, which must be gloo (None: the default one), call it.

    ``state`` is the rank's part of the training state: parameters and persistent buffers by the decoder's names, plain
    or DTensors; a pipeline rank has those of its layers. Without a process group it is the whole model. A model that is
    in ``store`` is replaced; what an export has no name for stays. Raises UserError where `transformers` has no such
    architecture, and on all ranks StoreError where one could not write.
    """
    of = family(config)
    alone = not dist.is_initialized()
    rank = 0 if alone else dist.get_rank(group)

    def first(call: Callable[[], None]) -> None:
        call() if alone else by_first(call, group)

    offers = {name: _mesh_ranks(tensor) for name, tensor in state.items()}
    files = _plan(counterparts(config, of), [offers] if alone else from_all(offers, group), dtype, file_bytes)
    first(lambda: clear(store))
    writer = _Writer(store)
    for file in files:
        if rank not in file.sharers:
            continue
        pieces: list[_Piece] = []
        for counterpart in file.holds:
            whole = _whole(state, counterpart, dtype)
            if rank == file.writer:
                pieces += _named(whole.cpu(), counterpart)
        if rank == file.writer:
            writer.write(file.name, pieces)
    failure = writer.finish()
    for found in [failure] if alone else from_all(failure, group):
        if found is not None:
            raise found
    first(lambda: _write_rest(store, config, files, tokenizer, dtype))


# --- who writes what -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    """One file, the ranks that have its tensors' shards, and the one of them that writes it."""

    name: str
    holds: tuple[Counterpart, ...]
    sharers: tuple[int, ...]
    writer: int


def _mesh_ranks(tensor: Tensor) -> tuple[int, ...]:
    """The ranks that share a DTensor; () of a plain tensor, which a rank has whole."""
    return tuple(sorted(tensor.device_mesh.mesh.flatten().tolist())) if isinstance(tensor, DTensor) else ()


def _plan(
    wanted: Sequence[Counterpart],
    offers: Sequence[Mapping[str, tuple[int, ...]]],
    dtype: torch.dtype,
    file_bytes: int,
) -> list[_File]:
    """The same on all ranks, from what each rank has. The tensors of a file have the same ranks; of a tied head's
    embedding on two pipeline ranks the first counts."""
    groups: list[tuple[tuple[int, ...], list[Counterpart]]] = []
    size = 0
    for counterpart in wanted:
        name = counterpart.name
        holders = {rank: offered[name] for rank, offered in enumerate(offers) if name in offered}
        if not holders and not counterpart.exact:
            raise TrainerError(f"export: no rank has {name}")
        sharers = holders[min(holders)] if holders else ()
        if not sharers:  # plain, or zeros where there is none: any rank that has it can write it
            able = set(holders) or set(range(len(offers)))
            sharers = groups[-1][0] if groups and able.issuperset(groups[-1][0]) else (min(able),)
        own = prod(counterpart.shape) * dtype.itemsize
        if not groups or groups[-1][0] != sharers or size + own > file_bytes:
            groups.append((sharers, []))
            size = 0
        groups[-1][1].append(counterpart)
        size += own
    total = len(groups)
    turns: dict[tuple[int, ...], int] = {}
    files = []
    for number, (ranks, holds) in enumerate(groups, 1):
        turn = turns[ranks] = turns.get(ranks, -1) + 1
        name = SINGLE if total == 1 else part(number, total)
        files.append(_File(name, tuple(holds), ranks, ranks[turn % len(ranks)]))
    return files


# --- tensors ---------------------------------------------------------------------------------------------------------

_Piece = tuple[str, Tensor]


def _whole(state: Mapping[str, Tensor], counterpart: Counterpart, dtype: torch.dtype) -> Tensor:
    """The whole tensor in the export's type, on its device. A collective where it is sharded."""
    tensor = state.get(counterpart.name)
    if tensor is None:  # a model without balancing has no router bias
        tensor = torch.zeros(counterpart.shape)
    whole = tensor.detach().to(torch.float32 if counterpart.exact else dtype)
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def _named(whole: Tensor, counterpart: Counterpart) -> list[_Piece]:
    if counterpart.stacked:
        return list(zip(counterpart.theirs, whole.unbind(0), strict=True))
    return [(counterpart.theirs[0], whole)]


class _Writer:
    """Sends files from a thread, one after the other, while the next one is put together."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, "export")
        self._sending: Future[None] | None = None
        self._failure: TrainerError | None = None

    def write(self, key: str, pieces: Sequence[_Piece]) -> None:
        """Send a file, behind the one before. After a failure nothing is sent any more."""
        self._wait()
        if self._failure is None:
            self._sending = self._pool.submit(self._send, key, pieces)

    def finish(self) -> TrainerError | None:
        """Wait for the last file; what went wrong."""
        self._wait()
        self._pool.shutdown()
        return self._failure

    def _wait(self) -> None:
        if self._sending is not None:
            try:
                self._sending.result()
            except TrainerError as error:
                self._failure = error
            except Exception as error:  # the other ranks must learn of it, too
                self._failure = TrainerError(f"export: {error!r}")
            self._sending = None

    def _send(self, key: str, pieces: Sequence[_Piece]) -> None:
        beginning = header([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pieces])
        self._store.put(key, b"".join([beginning, *(_bytes(tensor) for _, tensor in pieces)]))


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, little-endian."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


# --- the other files -------------------------------------------------------------------------------------------------


def _write_rest(
    store: ObjectStore,
    config: DecoderConfig,
    files: Sequence[_File],
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
) -> None:
    end = None if tokenizer is None else end_of_text(tokenizer)
    texts: dict[str, Any] = {}
    if len(files) > 1:
        names = {name: file.name for file in files for held in file.holds for name in held.theirs}
        total = sum(prod(held.shape) * (4 if held.exact else dtype.itemsize) for file in files for held in file.holds)
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    if tokenizer is not None and end is not None:
        token = tokenizer.id_to_token(end)
        texts[TOKENIZER_CONFIG] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": token,
            "pad_token": token,
            "model_max_length": config.max_length,
            "clean_up_tokenization_spaces": False,
        }
        texts[TOKENIZER] = json.loads(tokenizer.to_str())
    texts[GENERATION] = {"eos_token_id": end, "do_sample": True}
    texts[CONFIG] = to_json(config, dtype=_NAMES[dtype], end_id=end)
    for key, value in texts.items():
        store.put(key, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
