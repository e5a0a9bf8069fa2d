"""A folder as object store: a disk of this machine, or a file system that all pods share.

A file system has no compare-and-swap: ``rename`` replaces whatever is there. What it has is ``link``, which fails
where the name is taken. So an object that is replaced under a condition, ``latest``, is a row of files ``latest.1``,
``latest.2`` …, each made once with ``link``; the highest number is the object, and the number is its etag. The older
files may go (``forget``). A slow writer may then find its number free again: so a writer looks behind its ``link`` and
believes in it only where no higher number is there, and the two newest never go.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote
from uuid import uuid4

from lockstep_trainer.errors import Conflict, Corrupt, NotFound, PreconditionFailed, StoreError
from lockstep_trainer.storage.checksum import EMPTY
from lockstep_trainer.storage.checksum import crc64nvme as checksum_of_bytes
from lockstep_trainer.storage.store import Buffer, Entry, Head, Unfinished, view_of
from lockstep_trainer.storage.verify import holds

SWAPPED = frozenset({"latest"})
"""Last part of the keys that are replaced under a condition; all others are plain files."""

_TEMPORARY = ".put-"  # prefix of files that are being written; no key may begin a part with it
_PIECE = 1 << 20  # bytes written at once
_VERSION = re.compile(r"^(?P<name>.+)\.(?P<number>[1-9][0-9]*)$")
_TEMPORARY_ERRORS = frozenset({"EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ENOSPC", "EDQUOT", "EHOSTDOWN", "ENOTCONN"})


class FolderStore:
    """ObjectStore in a folder. Puts are atomic and durable: file and folder are synced before they return."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)

    @property
    def uri(self) -> str:
        return "file://" + quote(str(self._root))

    def below(self, prefix: str) -> FolderStore:
        return FolderStore(self._path(prefix))

    def put(self, key: str, data: bytes, *, only_if_absent: bool = False, if_match: str | None = None) -> str:
        path = self._path(key)
        with _store_errors(f"put {path}"):
            if path.name not in SWAPPED:
                if if_match is not None:
                    raise StoreError(f"put {path}: in a folder only {sorted(SWAPPED)} can be replaced on a condition")
                self._write(path, data, replace=not only_if_absent)
                return _etag(data)
            number = max(self._versions(path), default=0)
            if (only_if_absent and number) or (if_match is not None and if_match != str(number)):
                raise PreconditionFailed(f"put {path}: its version is {number or 'none'}, not {if_match or 'none'}")
            # The number is this put's claim: link fails for all but one of those who read the same version.
            self._write(path.with_name(f"{path.name}.{number + 1}"), data, replace=False)
            # Where its version was forgotten since, the number was free although newer ones are there.
            if (newest := max(self._versions(path), default=0)) > number + 1:
                raise Conflict(f"put {path}: version {newest} is there already, besides {number + 1}")
            return str(number + 1)

    def put_buffer(self, key: str, data: Buffer, *, crc64nvme: str, only_if_absent: bool = True) -> None:
        path = self._path(key)
        if path.name in SWAPPED:
            raise StoreError(
                f"put {path}: in a folder {sorted(SWAPPED)} are small and replaced on a condition: use put"
            )
        view = view_of(data)
        try:
            with _store_errors(f"put {path}"):
                # Asked first, so as not to write it all for nothing.
                if only_if_absent and path.exists():
                    raise PreconditionFailed(f"put {path}: it exists")
                self._write(path, view, replace=not only_if_absent, crc64nvme=crc64nvme)
        except PreconditionFailed:
            if not holds(self, key, len(view), crc64nvme, trust=False):
                raise StoreError(f"{path} exists already, with other content") from None

    def get(self, key: str) -> tuple[bytes, str]:
        path = self._path(key)
        with _store_errors(f"get {path}"):
            if path.name not in SWAPPED:
                data = path.read_bytes()
                return data, _etag(data)
            while number := max(self._versions(path), default=0):
                try:
                    return path.with_name(f"{path.name}.{number}").read_bytes(), str(number)
                except FileNotFoundError:  # forgotten, or deleted, since the folder was read: look again
                    continue
            raise NotFound(f"get {path}: there is no such object")

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        path = self._path(key)
        with _store_errors(f"get {path}"), path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def get_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        path = self._path(key)
        total = 0
        with _store_errors(f"get {path}"), path.open("rb", buffering=0) as file:
            file.seek(offset)
            for view in map(view_of, buffers):
                position = 0
                while position < len(view) and (count := file.readinto(view[position:])):
                    position += count
                total += position
        return total

    def head(self, key: str) -> Head:
        path = self._path(key)
        with _store_errors(f"head {path}"):
            if path.name in SWAPPED:
                path = path.with_name(f"{path.name}.{max(self._versions(path), default=0)}")
            stat = path.stat()
        return Head(stat.st_size, None, stat.st_mtime)

    def verifies_uploads(self) -> bool:
        """What is written is checksummed on its way into the file; reading it back would ask the page cache."""
        return True

    def unfinished(self, prefix: str = "") -> tuple[Unfinished, ...]:
        found = [
            Unfinished(key, path.name, stat.st_mtime)
            for path, key, stat in self._files(prefix)
            if path.name.startswith(_TEMPORARY)
        ]
        return tuple(sorted(found, key=lambda upload: upload.key))

    def abort(self, upload: Unfinished) -> None:
        path = self._path(upload.key)
        if not path.name.startswith(_TEMPORARY):
            raise StoreError(f"{path} is no upload: it would be lost")
        with _store_errors(f"abort the upload {path}"):
            path.unlink(missing_ok=True)
            _remove_empty_folders(path.parent, self._root)

    def list(self, prefix: str = "", *, readable: bool = False) -> tuple[Entry, ...]:
        entries: dict[str, Entry] = {}
        for path, own_key, stat in self._files(prefix, readable):
            if path.name.startswith(_TEMPORARY):
                continue
            key, match = own_key, _VERSION.match(path.name)
            if match and match["name"] in SWAPPED:
                key = path.with_name(match["name"]).relative_to(self._root).as_posix()
            known = entries.get(key)
            if key.startswith(prefix) and (known is None or known.modified <= stat.st_mtime):
                entries[key] = Entry(key, stat.st_size, stat.st_mtime)
        return tuple(entries[key] for key in sorted(entries))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _store_errors(f"delete {path}"):
            if path.name in SWAPPED:
                for number in sorted(self._versions(path)):
                    path.with_name(f"{path.name}.{number}").unlink(missing_ok=True)
            else:
                path.unlink(missing_ok=True)
            _remove_empty_folders(path.parent, self._root)

    def forget(self, key: str, before: float) -> int:
        path = self._path(key)
        removed = 0
        with _store_errors(f"forget what {path} was"):
            for number in sorted(self._versions(path))[:-2]:
                # By the age of what took its place: whoever reads it may have found it the newest until then.
                successor = path.with_name(f"{path.name}.{number + 1}")
                if successor.exists() and successor.stat().st_mtime >= before:
                    break
                path.with_name(f"{path.name}.{number}").unlink(missing_ok=True)
                removed += 1
        return removed

    # ------------------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise StoreError(f"{key!r} is no key: it leaves the folder {self._root}")
        return self._root / key

    def _files(self, prefix: str, readable: bool = False) -> Iterator[tuple[Path, str, os.stat_result]]:
        """All files below the prefix as path, path within the store, stat; those under way and versions too."""
        with _store_errors(f"list {self._path(prefix)}"):
            for key, stat in _files_below(self._root, prefix, readable):
                yield self._path(key), key, stat

    def _versions(self, path: Path) -> Iterator[int]:
        try:
            names = os.listdir(path.parent)
        except FileNotFoundError:
            return
        for name in names:
            match = _VERSION.match(name)
            if match and match["name"] == path.name:
                yield int(match["number"])

    def _write(self, path: Path, data: Buffer, *, replace: bool, crc64nvme: str | None = None) -> None:
        temporary = path.with_name(f"{_TEMPORARY}{uuid4().hex}")
        for _ in range(8):  # `delete` may remove the folder between its making and its use
            _make_folders(path.parent)
            try:
                file = temporary.open("xb")
                break
            except FileNotFoundError:
                continue
        else:
            raise StoreError(f"put {path}: its folder is removed again and again", temporary=True)
        try:
            with file:
                if crc64nvme is None:
                    file.write(data)
                else:
                    _write_checked(file, view_of(data), crc64nvme, path)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                _link(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _write_checked(file: BinaryIO, view: memoryview, crc64nvme: str, path: Path) -> None:
    """Write it piece by piece, each checksummed while it is in the cache; raises Corrupt."""
    checksum = EMPTY
    for start in range(0, len(view), _PIECE):
        piece = view[start : start + _PIECE]
        checksum = checksum_of_bytes(piece, checksum)
        file.write(piece)
    if checksum != crc64nvme:
        raise Corrupt(f"put {path}: the bytes in memory are not those of checksum {crc64nvme}")


def _link(source: Path, target: Path) -> None:
    """Give the file its name, where the name is free; raises PreconditionFailed where it is not."""
    try:
        os.link(source, target)
    except FileExistsError:
        # NFS may answer a repeated request with «exists» although the first one made the link: count them.
        if source.stat().st_nlink != 2:
            raise PreconditionFailed(f"put {target}: it exists") from None


def _files_below(root: Path, prefix: str, readable: bool) -> Iterator[tuple[str, os.stat_result]]:
    """Key and stat of all files below ``root`` whose key begins with ``prefix``, links to folders not followed.

    Unlike ``os.walk`` it raises what goes wrong: a folder that could not be read is not an empty one, and what it holds
    must not count as gone. With ``readable`` only the folder that the prefix names must be one that may be read.
    Folders whose files can't begin with the prefix are not read: they may be somebody else's.
    """
    folder = prefix[: prefix.rfind("/") + 1]
    try:
        with os.scandir(root / folder) as found:
            entries = list(found)
    except FileNotFoundError:  # removed since its name was read, or never made
        return
    for entry in entries:
        key = f"{folder}{entry.name}"
        if not key.startswith(prefix):
            continue
        try:
            if not entry.is_dir():
                yield key, os.stat(root / key)
            elif not entry.is_symlink():
                yield from _files_below(root, f"{key}/", readable)
        except FileNotFoundError:  # removed since the folder was read
            continue
        except PermissionError:
            if not readable:
                raise


def _make_folders(path: Path) -> None:
    """Like ``mkdir -p``, and each new folder's name is durable."""
    if path.is_dir():
        return
    _make_folders(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_empty_folders(path: Path, root: Path) -> None:
    while path != root and root in path.parents:
        try:
            path.rmdir()
        except OSError:  # not empty, or gone
            return
        path = path.parent


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _store_errors(doing: str) -> Iterator[None]:
    import errno

    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"{doing}: there is no such object") from None
    except OSError as error:
        temporary = errno.errorcode.get(error.errno or 0, "") in _TEMPORARY_ERRORS
        raise StoreError(f"{doing}: {error.strerror or error}", temporary=temporary) from error
