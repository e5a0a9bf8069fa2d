"""What an object store must do, and how one is opened.

Keys are relative, with ``/`` between their parts. All methods block; call them from a thread where that matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote, urlsplit

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.errors import PreconditionFailed, StoreError, UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a listing."""

    key: str
    size: int  # bytes
    modified: float  # Unix seconds, by the store's clock


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

    def get(self, key: str) -> tuple[bytes, str]:
        """The object and its etag; raises NotFound."""
        ...

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, fewer where the object ends; raises NotFound."""
        ...

    def list(self, prefix: str = "") -> tuple[Entry, ...]:
        """All objects whose key begins with ``prefix``, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object. Not an error where there is none."""
        ...

    def below(self, prefix: str) -> ObjectStore:
        """The same store rooted ``prefix`` further down."""
        ...


def open_store(uri: str, s3: S3Spec | None = None) -> ObjectStore:
    """The store at ``uri`` (s3://bucket/prefix or file:///folder). Nothing is contacted yet.

    boto3 is imported only for s3://. Raises UserError for any other URI.
    """
    parts = urlsplit(uri)
    path = unquote(parts.path)
    if parts.scheme == "s3" and parts.netloc:
        from lockstep_trainer.storage.s3 import S3Store

        return S3Store(parts.netloc, path.strip("/"), s3 or S3Spec())
    if parts.scheme == "file" and not parts.netloc and path.startswith("/"):
        from lockstep_trainer.storage.folder import FolderStore

        return FolderStore(path)
    raise UserError(f"{uri!r} names no store: write s3://bucket/prefix, or file:///folder with three slashes")


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
