"""Brings a rank's snapshot from the memory-backed volume to the store, byte for byte; and makes the listing of it.

The checksums of the files come from those that the worker made behind its copy, so what the store receives is held
against what the worker copied. No torch here: agents upload.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lockstep_api.messages import RestorePoint, StateId, StoredFile
from lockstep_trainer.checkpoint.manifest import METADATA, FileEntry, Listing, Ranges, ranges_file, step_folder
from lockstep_trainer.checkpoint.snapshots import Reading, Snapshot, reading, real_parent, sample_lines
from lockstep_trainer.errors import CheckpointError, Corrupt, NotFound, NotStored
from lockstep_trainer.storage import ObjectStore
from lockstep_trainer.storage.checksum import EMPTY, combine, crc64nvme

_FILES = 4
"""Of a rank at the same time; large ones go in parts besides."""


class Stopped(CheckpointError):
    """The upload is not wanted any more."""


@dataclass(frozen=True, slots=True)
class RankUpload:
    """What a rank has in the step folder."""

    files: tuple[StoredFile, ...]
    header: str | None  # rank 0's


def upload_rank(
    folder: Path,
    state: StateId,
    parent: RestorePoint | None,
    store: ObjectStore,
    *,
    wanted: Callable[[], bool] = lambda: True,
    sent: Callable[[int], None] = lambda _: None,
) -> RankUpload:
    """Upload the snapshot of ``state`` in the rank's ``folder``; what is there already is not sent again.

    ``store`` is rooted at the job's prefix; ``parent`` is the newest durable state by the leader's count; ``sent`` is
    told the bytes of each file. Blocks. Raises NoSnapshotError where the volume has no such snapshot, Stopped once
    ``wanted`` is false, Corrupt where the volume holds something else, StoreError.
    """
    with reading(folder, state, wait=True) as held:
        snapshot, plan = held.snapshot, held.plan
        descends_from = real_parent(parent, snapshot.root)
        key = step_folder(state)

        def put(name: str, data: memoryview | bytes, checksum: str) -> StoredFile:
            if not wanted():
                raise Stopped(f"{key}: another upload was ordered")
            store.put_buffer(f"{key}/{name}", data, crc64nvme=checksum)
            sent(len(data))
            return StoredFile(name, len(data), checksum)

        small: list[tuple[str, bytes]] = []
        large = []
        ranges: dict[str, tuple[tuple[int, int, str], ...]] = {}
        for number, file in enumerate(plan.files):
            checksum, pieces = _file_checksum(held, number)
            ranges[file.name] = pieces
            large.append(partial(put, file.name, held.data[file.offset : file.offset + file.size], checksum))
        small.append((ranges_file(plan.rank), Ranges(files=ranges).to_bytes()))
        if snapshot.samples is not None:
            since = descends_from.state.step if descends_from else 0
            _check_log(snapshot, since)
            small.append((snapshot.samples, sample_lines(held.samples.read_text(), since).encode()))
        if plan.metadata:
            small.append((METADATA, held.metadata.read_bytes()))
        files = _at_once([*large, *(partial(put, name, data, crc64nvme(data)) for name, data in small)])
        header = json.dumps({**snapshot.header, "parent": _wire(descends_from)}) if plan.rank == 0 else None
        return RankUpload(tuple(files), header)


def listing_of(header: str, parent: RestorePoint | None, files: Iterable[StoredFile]) -> Listing:
    """The listing of a step folder that all slots have uploaded. Where ``header`` names a parent that one counts: the
    uploader knows what the state descends from. Raises Corrupt where the header is no listing's, and where a rank has
    brought nothing: a rank without tensors has its ranges all the same."""
    raw: dict[str, Any] = {"parent": _wire(parent), **json.loads(header)}
    entries = sorted((FileEntry(**asdict(file)) for file in files), key=lambda file: file.name)
    raw["files"] = [entry.model_dump() for entry in entries]
    listing = Listing.from_bytes(json.dumps(raw).encode(), "the header of an upload")
    names = {file.name for file in listing.files}
    if missing := [rank for rank in range(listing.layout.world_size) if ranges_file(rank) not in names]:
        raise Corrupt(f"{listing.folder} lacks the files of {len(missing)} ranks, the first is rank {missing[0]}")
    return listing


def check_stored(store: ObjectStore, listing: Listing) -> None:
    """Raise NotStored where ``store``, rooted at the job's prefix, lacks a file of the listing or has it at
    another size: of a folder that the pods do not share each sees its own, and nobody could restore the state."""
    sizes = {entry.key: entry.size for entry in store.list(f"{listing.folder}/")}
    for file in listing.files:
        key = f"{listing.folder}/{file.name}"
        size = sizes.get(key)
        if size is None:  # a network file system may list a folder as it was seconds ago, and finds a name all the same
            try:
                size = store.head(key).size
            except NotFound:
                raise NotStored(
                    f"checkpoint.uri: {store.uri}/{key} is not there, though a pod has stored it; name a bucket, or a "
                    "folder on a file system that all pods share"
                ) from None
        if size != file.size:
            raise NotStored(f"{store.uri}/{key} has {size} bytes, and {file.size} were stored: not committed")


def _file_checksum(held: Reading, number: int) -> tuple[str, tuple[tuple[int, int, str], ...]]:
    """The checksum of a whole file, combined from those of its pieces and the zeros between them; and its ranges."""
    file = held.plan.files[number]
    whole, end = EMPTY, 0
    pieces = []
    for index, item in held.plan.of_file(number):
        offset, checksum = item.offset - file.offset, held.snapshot.crc64nvme[index]
        if gap := offset - end:
            whole = combine(whole, crc64nvme(bytes(gap)), gap)
        whole = combine(whole, checksum, item.length)
        end = offset + item.length
        pieces.append((offset, item.length, checksum))
    return whole, tuple(pieces)


def _check_log(snapshot: Snapshot, since: int) -> None:
    if snapshot.since > since:
        raise Corrupt(
            f"the sample log of step {snapshot.state.step} begins behind step {snapshot.since}, and its parent is "
            f"step {since}: samples in between would be lost"
        )


def _at_once(calls: Sequence[Callable[[], StoredFile]]) -> list[StoredFile]:
    """The results in order; small files are sent beside the large ones. After a failure no further call begins; raises
    the first when those under way have ended."""
    with ThreadPoolExecutor(_FILES, thread_name_prefix="files") as pool:
        futures = [pool.submit(call) for call in calls]
        if any(future.exception() for future in wait(futures, return_when=FIRST_EXCEPTION).done):
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures if not future.cancelled()]


def _wire(point: RestorePoint | None) -> dict[str, Any] | None:
    return None if point is None else asdict(point)
