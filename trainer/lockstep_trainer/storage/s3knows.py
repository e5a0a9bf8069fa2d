"""Whether an S3 server verifies CRC64NVME: AWS does since the end of 2024, others by and by.

A server that does not know the checksum refuses the request, or ignores it. Both are found out with two small objects,
once per process and bucket, before the first large put; ``put_buffer`` then leaves the checksum out and reads back.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING
from uuid import uuid4

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.errors import StoreError
from lockstep_trainer.storage.checksum import crc64nvme, to_header
from lockstep_trainer.storage.retries import persistently
from lockstep_trainer.storage.s3client import Rejected, store_errors
from lockstep_trainer.storage.s3parts import encryption

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

_DATA, _OTHER = b"lockstep", b"another"
_known: dict[tuple[str, str], bool] = {}  # by S3Spec and bucket
_lock = threading.Lock()


def verifies_crc64nvme(client: S3Client, s3: S3Spec, bucket: str, prefix: str) -> bool:
    """Whether it does; the objects are put below ``prefix`` and removed. Raises StoreError where the store is away."""
    name = (s3.model_dump_json(), bucket)
    with _lock:
        if name not in _known:
            _known[name] = persistently(lambda: _ask(client, s3, bucket, prefix))
            if not _known[name]:
                log.warning("s3://%s does not verify CRC64NVME: every upload is read back", bucket)
        return _known[name]


def _ask(client: S3Client, s3: S3Spec, bucket: str, prefix: str) -> bool:
    key = f"{prefix}probe-{uuid4().hex}"
    right, wrong = to_header(crc64nvme(_DATA)), to_header(crc64nvme(_OTHER))
    try:
        with store_errors(f"put s3://{bucket}/{key}"):
            client.put_object(Bucket=bucket, Key=key, Body=_DATA, ChecksumCRC64NVME=right, **encryption(s3))
            answer = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        if answer.get("ChecksumCRC64NVME") != right:
            return False
        return _refuses(client, s3, bucket, key, wrong)
    except Rejected:
        return False
    finally:
        try:
            with store_errors(f"delete s3://{bucket}/{key}"):
                client.delete_object(Bucket=bucket, Key=key)
        except StoreError as error:  # a few bytes
            log.info("%s", error)


def _refuses(client: S3Client, s3: S3Spec, bucket: str, key: str, wrong: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        with store_errors(f"put s3://{bucket}/{key}"):
            client.put_object(Bucket=bucket, Key=key, Body=_DATA, ChecksumCRC64NVME=wrong, **encryption(s3))
    except StoreError as error:
        cause = error.__cause__
        status = cause.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(cause, ClientError) else 0
        if status == 400:
            return True
        raise
    return False
