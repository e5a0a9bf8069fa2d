"""A folder as object store: a disk of this machine, or a file system that all pods share.

A file system has no compare-and-swap: ``rename`` replaces whatever is there. What it has is ``link``, which fails
where the name is taken. So an object that is replaced under a condition, ``latest``, is a row of files ``latest.1``,
``latest.2`` …, each made once with ``link``; the highest number is the object, and the number is its etag. These files
are never removed while the object lives (a slow writer must not find its number free again); each is small.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

from lockstep_trainer.errors import NotFound, PreconditionFailed, StoreError
from lockstep_trainer.storage.store import Entry

SWAPPED = frozenset({"latest"})
"""Last part of the keys that are replaced under a condition; all others are plain files."""

_TEMPORARY = ".put-"  # prefix of files that are being written; no key may begin a part with it
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
            return str(number + 1)

    def get(self, key: str) -> tuple[bytes, str]:
        path = self._path(key)
        with _store_errors(f"get {path}"):
            if path.name not in SWAPPED:
                data = path.read_bytes()
                return data, _etag(data)
            number = max(self._versions(path), default=0)
            if not number:
                raise NotFound(f"get {path}: there is no such object")
            return path.with_name(f"{path.name}.{number}").read_bytes(), str(number)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        path = self._path(key)
        with _store_errors(f"get {path}"), path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def list(self, prefix: str = "") -> tuple[Entry, ...]:
        base = self._path(prefix)
        # Walk only the folder that the prefix names, not the whole store.
        top = base if prefix.endswith("/") or not prefix else base.parent
        entries: dict[str, Entry] = {}
        with _store_errors(f"list {base}"):
            for folder, _, names in os.walk(top):
                for name in names:
                    if name.startswith(_TEMPORARY):
                        continue
                    path = Path(folder, name)
                    try:
                        stat = path.stat()
                    except FileNotFoundError:  # removed since the folder was read
                        continue
                    match = _VERSION.match(name)
                    if match and match["name"] in SWAPPED:
                        path = path.with_name(match["name"])
                    key = path.relative_to(self._root).as_posix()
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

    # ------------------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise StoreError(f"{key!r} is no key: it leaves the folder {self._root}")
        return self._root / key

    def _versions(self, path: Path) -> Iterator[int]:
        try:
            names = os.listdir(path.parent)
        except FileNotFoundError:
            return
        for name in names:
            match = _VERSION.match(name)
            if match and match["name"] == path.name:
                yield int(match["number"])

    def _write(self, path: Path, data: bytes, *, replace: bool) -> None:
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
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                _link(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Give the file its name, where the name is free; raises PreconditionFailed where it is not."""
    try:
        os.link(source, target)
    except FileExistsError:
        # NFS may answer a repeated request with «exists» although the first one made the link: count them.
        if source.stat().st_nlink != 2:
            raise PreconditionFailed(f"put {target}: it exists") from None


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
