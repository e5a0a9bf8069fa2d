"""A checkpoint read into the live state, streaming, by all ranks together and at any layout.

The plan (``fetch``) says who reads what. Each rank reads ahead in threads (``ahead``); no byte leaves the thread that
read it before its checksum was compared. In rounds the ranks then agree that nobody met a wrong byte, pass on what
others need, and copy (``exchange``). What fails on one rank raises on all in the same round: the group stays usable.
"""

from __future__ import annotations

import logging
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lockstep_trainer.agreement import by_first, from_all
from lockstep_trainer.checkpoint.ahead import Ahead
from lockstep_trainer.checkpoint.exchange import Exchange
from lockstep_trainer.checkpoint.fetch import WINDOW, Item, plan
from lockstep_trainer.checkpoint.manifest import METADATA, RANGES, FileEntry, Manifest, Ranges, ranges_of
from lockstep_trainer.checkpoint.metadata import load_metadata
from lockstep_trainer.checkpoint.pieces import Contents, pieces_of, targets_of
from lockstep_trainer.errors import Corrupt, NotFound, StoreError, TrainerError
from lockstep_trainer.storage import ObjectStore
from lockstep_trainer.storage.checksum import crc64nvme

T = TypeVar("T")
log = logging.getLogger(__name__)

Group = dist.ProcessGroup | None


def load(
    state: Mapping[str, Any],
    store: ObjectStore,
    folder: str,
    manifest: Manifest,
    *,
    group: Group,
    window: int = WINDOW,
) -> None:
    """Fill the tensors of ``state`` (nested dicts; DTensors where sharded) in place; all ranks of ``group``, which must
    be gloo, call it. Each byte is read from the store at most once, whatever the number of ranks.

    Host memory beside the state: ``window`` bytes per rank; where an item (one tensor shard, as written) is larger than
    half of that, such an item takes its size in place of each half. Besides the plan: some hundred bytes per shard.

    Raises on all ranks: Corrupt where one met bytes that are missing or wrong, StoreError where the store failed one,
    UserError where ``state`` is not what was saved, in names, shapes or dtypes. ``state`` is then worthless.
    """
    where = f"{store.uri}/{folder}"
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    with ThreadPoolExecutor(1, thread_name_prefix="ranges") as pool:
        # They are wanted behind the plan, and take a request that need not wait for it.
        coming = pool.submit(_ranges, store, folder, manifest, rank=rank, size=size)
        # Every rank needs the metadata; one reads it.
        metadata = by_first(lambda: read_file(store, folder, manifest.file(METADATA)), group)
        contents = Contents(load_metadata(metadata, f"{where}/{METADATA}"), where)
        del metadata
        pieces = _together(lambda: pieces_of(state, contents), group)
        own = sorted({piece.want for piece in pieces})
        answers = from_all((own, socket.gethostname()), group)
        wants, hosts = [wanted for wanted, _ in answers], [host for _, host in answers]
        numbers = {number for wanted in wants for number, _ in wanted}
        items = _together(lambda: contents.items(numbers), group)
        if rank == 0 and (strangers := contents.strangers(numbers)):
            log.warning(
                "%s has %d tensors that this job's state lacks, such as %s", where, len(strangers), strangers[0]
            )
        found = from_all(_together(lambda: _checksums(items, coming.result(), where), group), group)
    checksums = {number: checksum for each in found for number, checksum in each.items()}
    if missing := next((item for number, item in items.items() if number not in checksums), None):
        raise Corrupt(f"{where} has no file {_ranges_of(missing.file, where)} in its manifest")
    targets = targets_of(pieces)
    rounds = plan(items, wants, hosts, window=window)
    reads = [read for each in rounds for read in each if read.reader == rank]
    swap = Exchange(targets, group, max_bytes=window // 2)
    with (
        Ahead(store, folder, reads, items, checksums, targets=targets, max_bytes=window // 2) as ahead,
        torch.no_grad(),
    ):
        for each in rounds:
            mine = sum(read.reader == rank for read in each)
            # Nothing here keeps what has arrived: its memory is free before more is read.
            swap.run(each, _together(partial(ahead.take, mine), group))
            ahead.done()


def read_file(store: ObjectStore, folder: str, file: FileEntry) -> bytes:
    """A whole file of a step folder, verified; raises Corrupt."""
    where = f"{store.uri}/{folder}/{file.name}"
    try:
        data, _ = store.get(f"{folder}/{file.name}")
    except NotFound:
        raise Corrupt(f"{where} is missing") from None
    if len(data) != file.size or crc64nvme(data) != file.crc64nvme:
        raise Corrupt(f"{where} differs from its checksum")
    return data


def _together(call: Callable[[], T], group: Group) -> T:
    """This rank's result of ``call``, which all ranks make; where it raises a TrainerError on one, it does on all."""
    error: TrainerError | None = None
    try:
        found = call()
    except TrainerError as failure:
        error = failure
    failed = torch.tensor(int(error is not None))
    dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if failed:
        raise _gravest(from_all(error, group)) from error
    return found


def _gravest(errors: Sequence[TrainerError | None]) -> TrainerError:
    """Of what the ranks met that which decides what all do next: what trying again would not help comes first."""

    def order(error: TrainerError) -> int:
        if isinstance(error, StoreError):
            return 3 if error.temporary else 2
        return 0 if isinstance(error, Corrupt) else 1

    return min((error for error in errors if error is not None), key=order)


def _ranges(store: ObjectStore, folder: str, manifest: Manifest, *, rank: int, size: int) -> dict[str, Ranges]:
    """This rank's share of the files of ranges, so that each is read once. Raises Corrupt."""
    names = sorted(file.name for file in manifest.files if file.name.startswith(RANGES))
    where = f"{store.uri}/{folder}"
    return {
        name: Ranges.from_bytes(read_file(store, folder, manifest.file(name)), f"{where}/{name}")
        for name in names[rank::size]
    }


def _checksums(items: Mapping[int, Item], ranges: Mapping[str, Ranges], where: str) -> dict[int, str]:
    """CRC64NVME of the items that these ranges speak of; raises Corrupt where they should and don't."""
    by_ranges: defaultdict[str, list[int]] = defaultdict(list)
    for number, item in items.items():
        by_ranges[_ranges_of(item.file, where)].append(number)
    found = {}
    for name, each in ranges.items():
        known = {
            (file, offset, length): checksum
            for file, pieces in each.files.items()
            for offset, length, checksum in pieces
        }
        for number in by_ranges[name]:
            item = items[number]
            checksum = known.get((item.file, item.offset, item.length))
            if checksum is None:
                raise Corrupt(f"{where}/{item.file}: bytes {item.offset}+{item.length} are not in {name}")
            found[number] = checksum
    return found


def _ranges_of(file: str, folder: str) -> str:
    try:
        return ranges_of(file)
    except ValueError:
        raise Corrupt(f"{folder}/{METADATA} names a file {file!r}, which is no rank's") from None
