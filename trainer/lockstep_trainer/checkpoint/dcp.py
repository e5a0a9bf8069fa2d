"""torch's distributed checkpoint on an object store, with a checksum on everything that is read.

The step folder is what torch itself writes, ``.metadata`` and ``__<rank>_<i>.distcp``, so its own FileSystemReader
opens it unaided. Besides, the writer keeps size and CRC64NVME of every file, for the manifest, and of every byte range
that a reader may ask for, in a file of ranges beside it; ``load`` checks what it gets before anyone sees the bytes.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint import StorageWriter
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lockstep_trainer.checkpoint.manifest import METADATA, FileEntry, Ranges, ranges_file
from lockstep_trainer.storage import ObjectStore, put_once
from lockstep_trainer.storage.checksum import crc64nvme

_FILE_BYTES = 256 * 1024**2
"""A file is closed when it is larger: far below the 5 GiB that one S3 put takes, and enough to upload in parallel."""
_UPLOADS = 4  # at once, per rank


@dataclasses.dataclass(frozen=True, slots=True)
class _Written:
    """What a rank knows of one item: torch's own storage info, and the checksums."""

    info: _StorageInfo
    crc64nvme: str
    file_size: int
    file_crc64nvme: str


class ObjectStoreWriter(StorageWriter):
    """Writes one step folder. A new one is made for each save.

    ``extra`` are files of this rank that lie in the folder beside the state. After ``dcp.save`` the coordinator finds
    all files of all ranks in ``files``.
    """

    def __init__(self, store: ObjectStore, folder: str, extra: Mapping[str, bytes] | None = None) -> None:
        self._store = store
        self._folder = folder
        self._extra = dict(extra or {})
        self._rank = 0
        self.files: tuple[FileEntry, ...] = ()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.files = ()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = int(kwargs.get("rank", 0) or 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # The writer's own rank is not passed to it in all versions of torch; the plan carries it.
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        rank = plan.storage_data if isinstance(plan.storage_data, int) else self._rank
        results: list[WriteResult] = []
        with ThreadPoolExecutor(_UPLOADS, thread_name_prefix="upload") as uploads:
            pending = [
                uploads.submit(put_once, self._store, f"{self._folder}/{name}", data)
                for name, data in self._extra.items()
            ]
            results += [
                WriteResult(MetadataIndex(name), len(data), _file(name, data)) for name, data in self._extra.items()
            ]
            for number, (data, items) in enumerate(_files(plan.items, planner)):
                name = f"__{rank}_{number}.distcp"
                results += _results(name, data, items)
                pending.append(uploads.submit(put_once, self._store, f"{self._folder}/{name}", data))
            ranges = _ranges(results).to_bytes()
            name = ranges_file(rank)
            pending.append(uploads.submit(put_once, self._store, f"{self._folder}/{name}", ranges))
            results.append(WriteResult(MetadataIndex(name), len(ranges), _file(name, ranges)))
            for upload in pending:
                upload.result()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        everything = [result for per_rank in results for result in per_rank]
        extra = [result.storage_data for result in everything if isinstance(result.storage_data, FileEntry)]
        written = [result for result in everything if isinstance(result.storage_data, _Written)]
        metadata.storage_data = {result.index: result.storage_data.info for result in written}
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_meta = self.storage_meta()
        data = pickle.dumps(metadata)
        put_once(self._store, f"{self._folder}/{METADATA}", data)
        items = {result.storage_data.info.relative_path: result.storage_data for result in written}
        self.files = (
            _file(METADATA, data),
            *sorted(extra, key=lambda file: file.name),
            *(
                FileEntry(name=name, size=items[name].file_size, crc64nvme=items[name].file_crc64nvme)
                for name in sorted(items)
            ),
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=f"{self._store.uri}/{self._folder}")


_Packed = list[tuple[WriteItem, int, int]]  # item, offset, length


def _files(items: Iterable[WriteItem], planner: SavePlanner) -> Iterator[tuple[bytes, _Packed]]:
    """The rank's items packed into files, with the place of each."""
    buffer, packed = io.BytesIO(), _Packed()
    for item in items:
        offset = buffer.tell()
        _serialize(planner.resolve_data(item), item, buffer)
        packed.append((item, offset, buffer.tell() - offset))
        if buffer.tell() >= _FILE_BYTES:
            yield buffer.getvalue(), packed
            buffer, packed = io.BytesIO(), []
    if packed:
        yield buffer.getvalue(), packed


def _serialize(data: torch.Tensor | io.BytesIO, item: WriteItem, buffer: io.BytesIO) -> None:
    if item.type == WriteItemType.BYTE_IO:
        assert isinstance(data, io.BytesIO)
        buffer.write(data.getbuffer())
        return
    assert isinstance(data, torch.Tensor)
    tensor = data.detach().cpu()
    # A view would take its whole storage with it.
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    torch.save(tensor, buffer)


def _results(name: str, data: bytes, items: _Packed) -> list[WriteResult]:
    view, whole = memoryview(data), crc64nvme(data)
    return [
        WriteResult(
            index=item.index,
            size_in_bytes=length,
            storage_data=_Written(
                info=_StorageInfo(name, offset, length),
                crc64nvme=crc64nvme(view[offset : offset + length]),
                file_size=len(data),
                file_crc64nvme=whole,
            ),
        )
        for item, offset, length in items
    ]


def _ranges(results: Iterable[WriteResult]) -> Ranges:
    """The ranges of all data files among the results."""
    files: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for result in results:
        if isinstance(written := result.storage_data, _Written):
            info = written.info
            files[info.relative_path].append((info.offset, info.length, written.crc64nvme))
    return Ranges(files={name: tuple(sorted(pieces)) for name, pieces in files.items()})


def _file(name: str, data: bytes) -> FileEntry:
    return FileEntry(name=name, size=len(data), crc64nvme=crc64nvme(data))
