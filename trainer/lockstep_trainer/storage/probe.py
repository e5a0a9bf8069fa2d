"""Whether a store keeps its conditions.

The whole commit protocol stands on them. Some S3 servers take a conditional put and ignore the condition; such a store
loses checkpoints silently, so it is refused before the first step.
"""

from __future__ import annotations

from uuid import uuid4

from lockstep_trainer.errors import PreconditionFailed, StoreError
from lockstep_trainer.storage.store import ObjectStore


def probe(store: ObjectStore) -> tuple[str, ...]:
    """Put, read and remove small objects; raises StoreError with a sentence where the store can't be used.

    Returns sentences on what is worse than it could be.
    """
    here = store.below(f"probe-{uuid4().hex}")
    try:
        _must_take(here, "once", b"first", only_if_absent=True)
        _must_refuse(here, "once", "If-None-Match: *", only_if_absent=True)
        etag = _must_take(here, "latest", b"first", only_if_absent=True)
        _must_take(here, "latest", b"second", if_match=etag)
        _must_refuse(here, "latest", "If-Match with an old etag", if_match=etag)
        for key, expected in (("once", b"first"), ("latest", b"second")):
            if here.get(key)[0] != expected:
                raise StoreError(f"{store.uri} returned other bytes than were written: it can't hold checkpoints")
        if here.get_range("once", 1, 3) != b"irs":
            raise StoreError(f"{store.uri} does not serve ranges of bytes: checkpoints can't be read from it")
        if not store.verifies_uploads():
            return (f"{store.uri} does not verify CRC64NVME checksums: every upload is read back, which takes longer",)
        return ()
    finally:
        for key in ("once", "latest"):
            try:
                here.delete(key)
            except StoreError:  # what the probe found matters more; a leftover is a few bytes
                continue


def _must_take(
    store: ObjectStore, key: str, data: bytes, *, only_if_absent: bool = False, if_match: str | None = None
) -> str:
    """Put what nobody else puts and return its etag. A put whose answer was lost is tried again by the client and then
    meets its own object."""
    try:
        return store.put(key, data, only_if_absent=only_if_absent, if_match=if_match)
    except PreconditionFailed as error:
        found, etag = store.get(key)
        if found != data:
            raise error from None
        return etag


def _must_refuse(
    store: ObjectStore, key: str, condition: str, *, only_if_absent: bool = False, if_match: str | None = None
) -> None:
    try:
        store.put(key, b"overwritten", only_if_absent=only_if_absent, if_match=if_match)
    except PreconditionFailed:
        return
    raise StoreError(
        f"{store.uri} accepted a put whose condition ({condition}) was false: two leaders could overwrite each other's "
        "checkpoints; use a store with conditional writes, AWS S3 for example, or a folder"
    )
