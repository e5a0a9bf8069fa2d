"""What an object store must do, and how one is opened.

Keys are relative, with ``/`` between their parts. All methods block; call them from a thread where that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote, urlsplit

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.errors import PreconditionFailed, StoreError, UserError

Buffer = bytes | bytearray | memoryview
"""Contiguous memory."""


def view_of(data: Buffer) -> memoryview:
    """``data`` as bytes, not copied; raises TypeError where it is not contiguous."""
    return memoryview(data).cast("B")


def cut_out(buffers: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """What holds the bytes from ``start`` to ``start + length`` of ``buffers`` (of bytes), one behind the other."""
    found, end = [], start + length
    position = 0
    for buffer in buffers:
        first, last = max(start - position, 0), min(end - position, len(buffer))
        if first < last:
            found.append(buffer[first:last])
        position += len(buffer)
    return found


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a listing."""

    key: str
    size: int  # bytes
    modified: float  # Unix seconds, by the store's clock


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of one object without reading it."""

    size: int  # bytes
    crc64nvme: str | None  # of the whole object, where the store keeps it
    modified: float  # Unix seconds, by the store's clock


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An upload that was begun and neither completed nor given up: it takes space and no listing shows it."""

    key: str  # of the object; in a folder, of the temporary file
    upload: str  # the store's name for it
    begun: float  # Unix seconds, by the store's clock


class ObjectStore(Protocol):
    """A flat map from key to bytes with conditional puts.

    Every method raises StoreError; ``temporary`` on it says whether trying again makes sense.
    """

    @property
    def uri(self) -> str:
        """Where this store is rooted: s3://bucket/prefix or file:///folder, without a slash at the end."""
        ...

    def put(self, key: str, data: bytes, *, only_if_absent: bool = False, if_match: str | None = None) -> str:
        """Store ``data`` atomically and return its etag.

        Raises PreconditionFailed where ``only_if_absent`` and the key exists, or where the key's etag is not
        ``if_match``; Conflict where the store could not decide between two puts.
        """
        ...

    def put_buffer(self, key: str, data: Buffer, *, crc64nvme: str, only_if_absent: bool = True) -> None:
        """Store memory of any size, in place and, where it is large, in parts at the same time.

        The store has verified ``crc64nvme`` when this returns, or the object was read back and verified here. An object
        that is there already with this content is success, so that the call may be repeated after any failure. Raises
        Corrupt where ``data`` itself differs from its checksum; StoreError where other content is there.
        """
        ...

    def get(self, key: str) -> tuple[bytes, str]:
        """The object and its etag; raises NotFound."""
        ...

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, fewer where the object ends; raises NotFound."""
        ...

    def get_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Read from ``offset`` into ``buffers``, one behind the other, large ranges in parts at the same time; raises
        NotFound.

        Returns the bytes read: fewer than the buffers hold where the object ends. Nothing is verified.
        """
        ...

    def head(self, key: str) -> Head:
        """Size and, where the store keeps it, checksum; raises NotFound."""
        ...

    def verifies_uploads(self) -> bool:
        """Whether the store itself checks CRC64NVME. Where it does not, ``put_buffer`` reads back what it has put."""
        ...

    def unfinished(self, prefix: str = "") -> tuple[Unfinished, ...]:
        """Uploads below ``prefix`` that are under way or were left behind."""
        ...

    def abort(self, upload: Unfinished) -> None:
        """Remove what an upload has stored so far; its writer, if it still lives, fails. No error where it is gone."""
        ...

    def list(self, prefix: str = "", *, readable: bool = False) -> tuple[Entry, ...]:
        """All objects whose key begins with ``prefix``, sorted by key.

        With ``readable`` what lies in folders that this process may not read is left out, for those who look around
        among what others have; never where what is not listed counts as gone.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object. Not an error where there is none."""
        ...

    def forget(self, key: str, before: float) -> int:
        """Remove what a store keeps of earlier contents of an object that is replaced on a condition, as far as they
        were replaced before ``before`` (Unix seconds), and return how many. S3 keeps none."""
        ...

    def below(self, prefix: str) -> ObjectStore:
        """The same store rooted ``prefix`` further down."""
        ...


def open_store(uri: str, s3: S3Spec | None = None) -> ObjectStore:
    """The store at ``uri`` (s3://bucket/prefix or file:///folder). Nothing is contacted yet.

    boto3 is imported only for s3://. Raises UserError for any other URI.
    """
    check_path(uri)
    parts = urlsplit(uri)
    path = unquote(parts.path)
    if parts.scheme == "s3" and parts.netloc:
        from lockstep_trainer.storage.s3 import S3Store

        return S3Store(parts.netloc, path.strip("/"), s3 or S3Spec())
    if parts.scheme == "file" and not parts.netloc and path.startswith("/"):
        from lockstep_trainer.storage.folder import FolderStore

        return FolderStore(path)
    raise UserError(f"{uri!r} names no store: write s3://bucket/prefix, or file:///folder with three slashes")


def check_path(uri: str) -> None:
    """Raises UserError where what is meant as a part of the URI's path is none."""
    if "?" in uri or "#" in uri:
        raise UserError(f"{uri!r}: what follows ? or # is no part of a URI's path; write %3F and %23, or another name")


def put_once(store: ObjectStore, key: str, data: bytes) -> None:
    """Store an object that only this writer ever writes.

    A put whose answer was lost is tried again by the client and then meets its own object: that is success, if the
    bytes are the same. Raises StoreError where other bytes are there.
    """
    try:
        store.put(key, data, only_if_absent=True)
    except PreconditionFailed:
        if store.get(key)[0] != data:
            raise StoreError(f"{store.uri}/{key} exists already, with other content") from None
