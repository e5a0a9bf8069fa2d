"""S3, and servers that speak its protocol, as object store.

Conditional puts (``If-None-Match``, ``If-Match``) carry the commit protocol. Every put names a checksum, so that the
server refuses bytes that were damaged on the way. boto3 moves the data, in threads of our own: it took less CPU time
than awscrt's S3 client and s3torchconnector and was no slower (docs/results/storage.json), and it alone lets each part
be read in place, paced, checked and tried again by itself.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.errors import Corrupt, NotFound, PreconditionFailed, StoreError
from lockstep_trainer.storage import s3knows, s3parts
from lockstep_trainer.storage.checksum import crc64nvme as checksum_of_bytes
from lockstep_trainer.storage.checksum import from_header
from lockstep_trainer.storage.pacing import shared
from lockstep_trainer.storage.retries import persistently
from lockstep_trainer.storage.s3client import RangeNotSatisfiable, client_of, store_errors
from lockstep_trainer.storage.store import Buffer, Entry, Head, Unfinished, view_of
from lockstep_trainer.storage.verify import holds

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PLAIN = "/=:+@,!$&'()*;~"
"""What stays as it is in a URI beside letters and digits: other tools take an s3:// URI as it is written, and would
look for %3D in place of =."""


class S3Store:
    """ObjectStore in a bucket below a prefix. One client per process, made at first use, shared by its threads."""

    def __init__(self, bucket: str, prefix: str, s3: S3Spec) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._s3 = s3

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{quote(self._prefix, safe=_PLAIN)}".rstrip("/")

    def forget(self, key: str, before: float) -> int:
        return 0

    def below(self, prefix: str) -> S3Store:
        return S3Store(self._bucket, f"{self._prefix}/{prefix.strip('/')}", self._s3)

    def put(self, key: str, data: bytes, *, only_if_absent: bool = False, if_match: str | None = None) -> str:
        condition: dict[str, Any] = {}
        if only_if_absent:
            condition["IfNoneMatch"] = "*"
        if if_match is not None:
            condition["IfMatch"] = if_match
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        try:
            with store_errors(f"put {self.uri}/{key}"):
                answer = self._client.put_object(
                    Bucket=self._bucket,
                    Key=self._key(key),
                    Body=data,
                    ChecksumSHA256=checksum,
                    **condition,
                    **s3parts.encryption(self._s3),
                )
        except NotFound:
            if if_match is None:
                raise
            # S3 answers 404 to If-Match on a key that is not there: the condition does not hold.
            raise PreconditionFailed(f"put {self.uri}/{key}: there is no such object to replace") from None
        return answer["ETag"]

    def put_buffer(self, key: str, data: Buffer, *, crc64nvme: str, only_if_absent: bool = True) -> None:
        view = view_of(data)
        verified = self.verifies_uploads()
        upload = s3parts.Upload(
            client=self._client,
            target={"Bucket": self._bucket, "Key": self._key(key)},
            name=f"{self.uri}/{key}",
            encryption=s3parts.encryption(self._s3),
            bandwidth=shared(self._s3.upload_bytes_per_second),
            only_if_absent=only_if_absent,
            verified=verified,
        )
        if s3parts.is_large(view):
            # The condition is checked behind the last part: ask first, so as not to send it all for nothing.
            if only_if_absent and self._is_there(key, view, crc64nvme):
                return
        elif checksum_of_bytes(view) != crc64nvme:
            raise Corrupt(f"put {upload.name}: the bytes in memory are not those of checksum {crc64nvme}")
        try:
            upload.run(view, crc64nvme)
        except (PreconditionFailed, NotFound) as error:
            # Someone has put it since, or this is the second try of a request whose first answer was lost.
            if only_if_absent and self._is_there(key, view, crc64nvme):
                return
            raise StoreError(f"{error}; its upload was removed under way", temporary=True) from error
        if not verified and not persistently(lambda: holds(self, key, len(view), crc64nvme, trust=False)):
            self.delete(key)
            raise StoreError(f"put {upload.name}: other bytes were read back; it is removed again", temporary=True)

    def get(self, key: str) -> tuple[bytes, str]:
        with store_errors(f"get {self.uri}/{key}"):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
            return answer["Body"].read(), answer["ETag"]

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        try:
            with store_errors(f"get {self.uri}/{key}"):
                answer = self._client.get_object(
                    Bucket=self._bucket, Key=self._key(key), Range=f"bytes={offset}-{offset + length - 1}"
                )
                return answer["Body"].read()
        except RangeNotSatisfiable:  # the object ends before the offset
            return b""

    def get_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        target = {"Bucket": self._bucket, "Key": self._key(key)}
        return s3parts.download(self._client, target, f"{self.uri}/{key}", offset, [view_of(each) for each in buffers])

    def head(self, key: str) -> Head:
        with store_errors(f"head {self.uri}/{key}"):
            answer = self._client.head_object(Bucket=self._bucket, Key=self._key(key), ChecksumMode="ENABLED")
        # Composite checksums, of the parts' checksums, say nothing that could be compared.
        whole = answer.get("ChecksumCRC64NVME") if answer.get("ChecksumType") != "COMPOSITE" else None
        return Head(answer["ContentLength"], from_header(whole) if whole else None, answer["LastModified"].timestamp())

    def verifies_uploads(self) -> bool:
        return s3knows.verifies_crc64nvme(self._client, self._s3, self._bucket, self._key(""))

    def unfinished(self, prefix: str = "") -> tuple[Unfinished, ...]:
        root = self._key("")
        found = []
        with store_errors(f"list uploads of {self.uri}/{prefix}"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._key(prefix)
            )
            for page in pages:
                found += [
                    Unfinished(item["Key"].removeprefix(root), item["UploadId"], item["Initiated"].timestamp())
                    for item in page.get("Uploads", [])
                ]
        return tuple(sorted(found, key=lambda upload: (upload.key, upload.begun)))

    def abort(self, upload: Unfinished) -> None:
        try:
            with store_errors(f"abort the upload of {self.uri}/{upload.key}"):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._key(upload.key), UploadId=upload.upload
                )
        except NotFound:
            return

    def list(self, prefix: str = "", *, readable: bool = False) -> tuple[Entry, ...]:
        root = self._key("")
        entries = []
        with store_errors(f"list {self.uri}/{prefix}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._key(prefix)
            )
            for page in pages:
                entries += [
                    Entry(item["Key"].removeprefix(root), item["Size"], item["LastModified"].timestamp())
                    for item in page.get("Contents", [])
                ]
        return tuple(sorted(entries, key=lambda entry: entry.key))

    def delete(self, key: str) -> None:
        with store_errors(f"delete {self.uri}/{key}"):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    # ------------------------------------------------------------------------------------------------------------

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}".lstrip("/")

    @property
    def _client(self) -> S3Client:
        return client_of(self._s3)

    def _is_there(self, key: str, view: memoryview, crc64nvme: str) -> bool:
        """Whether the object exists with this content; raises StoreError where it has another."""
        try:
            same = persistently(lambda: holds(self, key, len(view), crc64nvme, trust=self.verifies_uploads()))
        except NotFound:
            return False
        if not same:
            raise StoreError(f"{self.uri}/{key} exists already, with other content")
        return True
