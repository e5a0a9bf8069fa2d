"""S3, and servers that speak its protocol, as object store.

Conditional puts (``If-None-Match``, ``If-Match``) carry the commit protocol; ``ChecksumSHA256`` on every put makes the
server refuse bytes that were damaged on the way.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.errors import Conflict, NotFound, PreconditionFailed, StoreError
from lockstep_trainer.storage.store import Entry

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# A call that fails for a moment is tried again inside the client (connection lost, throttled, 5xx); a longer outage is
# the caller's business: it goes on training and comes back.
_RETRIES = 3
_CONNECT_SECONDS = 5
_READ_SECONDS = 30
_NOT_FOUND = frozenset({"404", "NoSuchKey", "NotFound"})
_THROTTLED = frozenset({"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "ThrottlingException"})


class S3Store:
    """ObjectStore in a bucket below a prefix. One client per process, made at first use, shared by its threads."""

    def __init__(self, bucket: str, prefix: str, s3: S3Spec) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._s3 = s3

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

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
            with self._errors(f"put {self.uri}/{key}"):
                answer = self._client.put_object(
                    Bucket=self._bucket, Key=self._key(key), Body=data, ChecksumSHA256=checksum, **condition
                )
        except NotFound:
            if if_match is None:
                raise
            # S3 answers 404 to If-Match on a key that is not there: the condition does not hold.
            raise PreconditionFailed(f"put {self.uri}/{key}: there is no such object to replace") from None
        return answer["ETag"]

    def get(self, key: str) -> tuple[bytes, str]:
        with self._errors(f"get {self.uri}/{key}"):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
            return answer["Body"].read(), answer["ETag"]

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        try:
            with self._errors(f"get {self.uri}/{key}"):
                answer = self._client.get_object(
                    Bucket=self._bucket, Key=self._key(key), Range=f"bytes={offset}-{offset + length - 1}"
                )
                return answer["Body"].read()
        except _RangeNotSatisfiable:  # the object ends before the offset
            return b""

    def list(self, prefix: str = "") -> tuple[Entry, ...]:
        root = self._key("")
        entries = []
        with self._errors(f"list {self.uri}/{prefix}"):
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
        with self._errors(f"delete {self.uri}/{key}"):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    # ------------------------------------------------------------------------------------------------------------

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}".lstrip("/")

    @property
    def _client(self) -> S3Client:
        return _client(self._s3)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise _translated(doing, error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreError(
                f"{doing}: no credentials; name a Secret with accessKeyId and secretAccessKey in "
                "checkpoint.s3.secretRef, or give the pods an identity"
            ) from error
        except BotoCoreError as error:  # no connection, timeout, answer cut off
            raise StoreError(f"{doing}: {error}", temporary=True) from error


class _RangeNotSatisfiable(StoreError):
    pass


def _translated(doing: str, error: ClientError) -> StoreError:
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    text = f"{doing}: {error.response.get('Error', {}).get('Message') or code or status}"
    if code == "NoSuchBucket":
        return StoreError(f"{doing}: the bucket does not exist; create it, or correct checkpoint.uri")
    if status == 412 or code == "PreconditionFailed":
        return PreconditionFailed(text)
    if status == 409:
        return Conflict(text, temporary=True)
    if status == 416:
        return _RangeNotSatisfiable(text)
    if code in _NOT_FOUND or status == 404:
        return NotFound(text)
    if status in (401, 403) and code not in _THROTTLED:
        return StoreError(f"{text}; check the credentials of checkpoint.s3.secretRef and the bucket's policy")
    return StoreError(text, temporary=status >= 500 or status == 429 or code in _THROTTLED)


_clients: dict[str, S3Client] = {}
_clients_lock = threading.Lock()


def _client(s3: S3Spec) -> S3Client:
    """The process's client for this endpoint: making one takes 0.1 s, and connections are worth keeping."""
    name = s3.model_dump_json()
    with _clients_lock:
        if name not in _clients:
            _clients[name] = boto3.client(
                "s3",
                endpoint_url=s3.endpoint,
                region_name=s3.region,
                config=Config(
                    connect_timeout=_CONNECT_SECONDS,
                    read_timeout=_READ_SECONDS,
                    retries={"mode": "standard", "total_max_attempts": _RETRIES},
                    s3={"addressing_style": "path" if s3.path_style else "auto"},
                    # Servers other than AWS do not know every checksum; ours is sent explicitly.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        return _clients[name]
