"""Large objects to and from S3, in parts at the same time.

All transfers of a process share eight threads: each keeps one connection busy, and with a part each they bound the
work that is lost where one fails.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.errors import Corrupt, StoreError
from lockstep_trainer.storage.checksum import EMPTY, combine, crc64nvme, to_header
from lockstep_trainer.storage.pacing import Bandwidth, Body
from lockstep_trainer.storage.retries import persistently
from lockstep_trainer.storage.s3client import RangeNotSatisfiable, store_errors
from lockstep_trainer.storage.store import cut_out

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

PART = 16 << 20
"""Bytes of a part, and of the largest object that is sent by one request. S3 takes none below 5 MiB but the last."""

_MOST_PARTS = 10_000  # S3's limit; larger objects get larger parts
_THREADS = 8
_READ = 256 * 1024  # bytes that are copied from the connection at once

T = TypeVar("T")


def encryption(s3: S3Spec) -> dict[str, Any]:
    """Arguments of a put that ask the server to encrypt the object, as the job says."""
    if s3.encryption is None:
        return {}
    key = {"SSEKMSKeyId": s3.encryption.kms_key_id} if s3.encryption.kms_key_id else {}
    return {"ServerSideEncryption": s3.encryption.type, **key}


def is_large(view: memoryview) -> bool:
    """Whether it is sent in parts."""
    return len(view) > PART


@dataclass(frozen=True, slots=True)
class Upload:
    """One object on its way to the store."""

    client: S3Client
    target: dict[str, Any]  # Bucket and Key
    name: str  # for messages
    encryption: dict[str, Any]
    bandwidth: Bandwidth | None
    only_if_absent: bool
    verified: bool  # the server checks CRC64NVME; else the caller reads back

    def run(self, view: memoryview, checksum: str) -> None:
        """Send all of it; raises PreconditionFailed, Corrupt where the memory is not what ``checksum`` says."""
        if is_large(view):
            self._in_parts(view, checksum)
        else:
            persistently(lambda: self._at_once(view, checksum))

    def _at_once(self, view: memoryview, checksum: str) -> None:
        named: dict[str, Any] = {"ChecksumCRC64NVME": to_header(checksum)} if self.verified else {}
        with store_errors(f"put {self.name}"):
            self.client.put_object(
                **self.target,
                Body=Body(view, self.bandwidth),  # type: ignore[arg-type]
                **self._condition,
                **self.encryption,
                **named,
            )

    def _in_parts(self, view: memoryview, checksum: str) -> None:
        size = part_size(len(view))
        kind = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"} if self.verified else {}
        with store_errors(f"put {self.name}"):
            upload = self.client.create_multipart_upload(**self.target, **self.encryption, **kind)["UploadId"]  # type: ignore[arg-type]
        try:
            pieces = [view[start : start + size] for start in range(0, len(view), size)]
            sent = _in_parallel(
                functools.partial(self._part, upload, number, piece) for number, piece in enumerate(pieces, 1)
            )
            whole = functools.reduce(
                lambda known, each: combine(known, each[0], len(each[1])),
                zip((own for own, _ in sent), pieces, strict=True),
                EMPTY,
            )
            if whole != checksum:
                raise Corrupt(f"put {self.name}: the bytes in memory are not those of checksum {checksum}")
            persistently(lambda: self._complete(upload, [part for _, part in sent], checksum))
        except BaseException:
            self._give_up(upload)
            raise

    def _part(self, upload: str, number: int, piece: memoryview) -> tuple[str, dict[str, Any]]:
        """Send one part: its checksum, and what completing says of it."""
        own = crc64nvme(piece)
        named: dict[str, Any] = {"ChecksumCRC64NVME": to_header(own)} if self.verified else {}

        def send() -> dict[str, Any]:
            with store_errors(f"put {self.name}, part {number}"):
                answer = self.client.upload_part(
                    **self.target,
                    UploadId=upload,
                    PartNumber=number,
                    Body=Body(piece, self.bandwidth),  # type: ignore[arg-type]
                    **named,
                )
            return {"PartNumber": number, "ETag": answer["ETag"], **named}

        return own, persistently(send)

    def _complete(self, upload: str, parts: list[dict[str, Any]], checksum: str) -> None:
        # With the whole object's checksum the server verifies that the parts are all there and in their order.
        whole = {"ChecksumType": "FULL_OBJECT", "ChecksumCRC64NVME": to_header(checksum)} if self.verified else {}
        with store_errors(f"put {self.name}, all parts"):
            self.client.complete_multipart_upload(
                **self.target,
                UploadId=upload,
                MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]
                **self._condition,
                **whole,  # type: ignore[arg-type]
            )

    def _give_up(self, upload: str) -> None:
        try:
            with store_errors(f"abort the upload of {self.name}"):
                self.client.abort_multipart_upload(**self.target, UploadId=upload)
        except StoreError as error:  # gone, or the store is away: the error on its way says more
            log.info("%s; what is left is collected later", error)

    @property
    def _condition(self) -> dict[str, Any]:
        return {"IfNoneMatch": "*"} if self.only_if_absent else {}


def part_size(size: int) -> int:
    """Bytes of each part but the last of an object of ``size`` bytes: 16 MiB, or what the limit of parts asks for."""
    return max(PART, -(-size // _MOST_PARTS))


def download(client: S3Client, target: dict[str, Any], name: str, offset: int, views: Sequence[memoryview]) -> int:
    """Fill ``views`` from ``offset`` on; returns the bytes read, fewer where the object ends. Raises NotFound."""
    size = sum(map(len, views))

    def fetch(start: int) -> int:
        pieces = cut_out(views, start, PART)
        return persistently(lambda: _fetch(client, target, name, offset + start, pieces))

    if size <= PART:
        return fetch(0) if size else 0
    return sum(_in_parallel(functools.partial(fetch, start) for start in range(0, size, PART)))


def _fetch(client: S3Client, target: dict[str, Any], name: str, offset: int, pieces: Sequence[memoryview]) -> int:
    size = sum(map(len, pieces))
    try:
        with store_errors(f"get {name}"):
            answer = client.get_object(**target, Range=f"bytes={offset}-{offset + size - 1}")
            if answer["ContentLength"] > size:
                raise StoreError(f"get {name}: the store does not serve ranges of bytes")
            with closing(answer["Body"]) as body:
                total = sum(_receive(body, piece) for piece in pieces)
    except RangeNotSatisfiable:
        return 0
    if total != answer["ContentLength"]:
        raise StoreError(f"get {name}: the answer was cut off", temporary=True)
    return total


def _receive(body: Any, piece: memoryview) -> int:
    """Fill it; returns the bytes read, fewer where the body ends."""
    position = 0
    while position < len(piece) and (count := body.readinto(piece[position : position + _READ])):
        position += count
    return position


def _in_parallel(calls: Iterable[Callable[[], T]]) -> list[T]:
    """The results in order. After the first failure no further call begins; raises it when those under way ended."""
    futures: list[Future[T]] = [_threads().submit(call) for call in calls]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        for future in futures:  # they read memory that the caller may reuse, and parts that the caller aborts
            if not future.cancelled():
                future.exception()
        raise


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "s3-transfer")
