"""Reads a whole step folder and compares every byte with what its manifest says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.checkpoint.chain import locate, read_manifest
from lockstep_trainer.checkpoint.manifest import MANIFEST, METADATA, FileEntry, Manifest, Ranges, ranges_of
from lockstep_trainer.checkpoint.metadata import load_metadata
from lockstep_trainer.errors import Corrupt, NotFound, StoreError
from lockstep_trainer.storage import ObjectStore
from lockstep_trainer.storage.checksum import EMPTY, combine, crc64nvme

_READ_BYTES = 32 * 1024**2
"""Read at once, and the memory that verifying takes."""

Pieces = tuple[tuple[int, int, str], ...]
"""Of a file: offset, length and checksum of each, as in ``Ranges``."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one file."""

    file: str
    message: str


def verify(
    store: ObjectStore, manifest: Manifest, read: Callable[[int], None], s3: S3Spec | None = None
) -> tuple[Problem, ...]:
    """All that is wrong with a step folder whose manifest was verified. ``read`` is told bytes as they are read; ``s3``
    is how the store of another job is reached, where the parent is in one.

    Each file's size and checksum, each range's; that ``.metadata`` can be read without running anything, and names only
    ranges with a checksum; and the parent, unless retention has removed it. Raises StoreError where the store fails.
    """
    problems: list[Problem] = []
    ranges: dict[str, Pieces] = {}
    small: dict[str, bytes] = {}
    data = [file for file in manifest.files if file.name.endswith(".distcp")]
    for file in manifest.files:
        if file in data:
            continue
        content, found = _whole(store, manifest.folder, file)
        problems += found
        read(file.size)
        if not found:
            small[file.name] = content
    for name in sorted({ranges_of(file.name) for file in data}):
        if name in small:
            try:
                ranges.update(Ranges.from_bytes(small[name], name).files)
            except Corrupt as error:
                problems.append(Problem(name, str(error)))
        elif all(file.name != name for file in manifest.files):
            problems.append(Problem(name, "the manifest does not name it: nothing vouches for its files' ranges"))
    for file in data:
        problems += _pieces(store, manifest.folder, file, ranges.get(file.name, ()), read)
    # Where ranges can't be read, that is said already.
    known = None if any(problem.file.startswith("ranges-") for problem in problems) else ranges
    problems += _metadata(small.get(METADATA), manifest, known)
    problems += _parent(store, manifest, s3)
    return tuple(problems)


def _whole(store: ObjectStore, folder: str, file: FileEntry) -> tuple[bytes, list[Problem]]:
    try:
        data, _ = store.get(f"{folder}/{file.name}")
    except NotFound:
        return b"", [Problem(file.name, "it is missing")]
    return data, _compared(file, len(data), crc64nvme(data))


def _compared(file: FileEntry, size: int, checksum: str) -> list[Problem]:
    if size != file.size:
        return [Problem(file.name, f"it has {size} bytes instead of {file.size}")]
    if checksum != file.crc64nvme:
        return [Problem(file.name, "it differs from its checksum")]
    return []


def _pieces(
    store: ObjectStore, folder: str, file: FileEntry, pieces: Pieces, read: Callable[[int], None]
) -> list[Problem]:
    """One pass over a data file: the checksum of each range, and from them that of the whole."""
    key = f"{folder}/{file.name}"
    found: list[Problem] = []
    end, whole = 0, EMPTY
    try:
        for offset, length, checksum in _with_gaps(sorted(pieces), file.size):
            if offset < end or offset + length > file.size:
                return [Problem(file.name, f"its ranges overlap, or go beyond its end, at byte {offset}")]
            size, own = _read(store, key, offset, length, read)
            end, whole = offset + size, combine(whole, own, size)
            if size < length:
                return [*found, Problem(file.name, f"it ends at byte {end} of {file.size}")]
            if checksum is not None and own != checksum:
                found.append(Problem(file.name, f"bytes {offset}+{length} differ from their checksum"))
        beyond = store.get_range(key, file.size, 1)
    except NotFound:
        return [Problem(file.name, "it is missing")]
    return found or _compared(file, end + len(beyond), whole)


def _with_gaps(pieces: list[tuple[int, int, str]], size: int) -> Iterator[tuple[int, int, str | None]]:
    """The pieces, and what lies between them and behind the last."""
    end = 0
    for offset, length, checksum in pieces:
        if offset > end:
            yield end, offset - end, None
        yield offset, length, checksum
        end = offset + length
    if end < size:
        yield end, size - end, None


def _read(store: ObjectStore, key: str, offset: int, length: int, read: Callable[[int], None]) -> tuple[int, str]:
    """Bytes that are there of a range, and their checksum; one block of them is in memory at a time."""
    done, checksum = 0, EMPTY
    while done < length:
        data = store.get_range(key, offset + done, min(_READ_BYTES, length - done))
        if not data:
            break
        checksum = crc64nvme(data, checksum)
        done += len(data)
        read(len(data))
    return done, checksum


def _metadata(data: bytes | None, manifest: Manifest, ranges: dict[str, Pieces] | None) -> list[Problem]:
    if data is None:
        named = any(file.name == METADATA for file in manifest.files)
        return [] if named else [Problem(METADATA, "the manifest does not name it")]
    try:
        metadata = load_metadata(data, METADATA)
    except Corrupt as error:
        return [Problem(METADATA, str(error))]
    if ranges is None:
        return []
    known = {(name, offset, length) for name, pieces in ranges.items() for offset, length, _ in pieces}
    for index, info in (metadata.storage_data or {}).items():
        if (info.relative_path, info.offset, info.length) not in known:
            return [
                Problem(
                    METADATA, f"{index.fqn} is to be read from {info.relative_path} where no range with a checksum is"
                )
            ]
    return []


def _parent(store: ObjectStore, manifest: Manifest, s3: S3Spec | None) -> list[Problem]:
    parent = manifest.parent
    if parent is None:
        return []
    home, key = locate(store, parent, s3)
    try:
        home.get(key)
    except NotFound:  # retention has removed it
        return []
    except StoreError:
        if home is store:
            raise
        return []  # another job's store, that is not open to us
    try:
        read_manifest(store, parent, s3)
    except Corrupt as error:
        return [Problem(MANIFEST, f"its parent: {str(error).removeprefix(f'{store.uri}/')}")]
    return []
