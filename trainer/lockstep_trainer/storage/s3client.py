"""The process's connection to an S3 server, and what its errors mean.

Credentials are those that boto3 finds, in its order: the environment (where the operator puts those of
checkpoint.s3.secretRef), web identity, configuration files, the container's and the instance's identity.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.errors import Conflict, NotFound, PreconditionFailed, StoreError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# A call that fails for a moment is tried again inside the client (connection lost, throttled, 5xx); a longer outage is
# the caller's business: it goes on training and comes back.
_RETRIES = 3
_CONNECT_SECONDS = 5
_READ_SECONDS = 30
_CONNECTIONS = 16
_METADATA_TRIES = "metadata_service_num_attempts"  # boto3's name for what the instance's identity is asked
_NOT_FOUND = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchUpload"})
_THROTTLED = frozenset({"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "ThrottlingException"})
_DAMAGED_ON_THE_WAY = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "IncompleteBody"})
_BAD_TOKEN = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_DENIED = "check the credentials of checkpoint.s3.secretRef and the bucket's policy"


class RangeNotSatisfiable(StoreError):
    """The object ends before the range begins."""


class Rejected(StoreError):
    """The server does not take this request as it is (HTTP 400 or 501)."""


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Errors of boto3 as StoreErrors whose text begins with what was done. No text holds a credential."""
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
        return RangeNotSatisfiable(text)
    if code in _NOT_FOUND or status == 404:
        return NotFound(text)
    if (status in (401, 403) and code not in _THROTTLED) or code in _BAD_TOKEN:
        return StoreError(f"{text}; {_DENIED}")
    temporary = code in _THROTTLED or code in _DAMAGED_ON_THE_WAY
    if status in (400, 501) and not temporary:
        return Rejected(text)
    return StoreError(text, temporary=temporary or status >= 500 or status == 429)


_clients: dict[str, S3Client] = {}  # by S3Spec
_clients_lock = threading.Lock()


def client_of(s3: S3Spec) -> S3Client:
    """The process's client for this endpoint: making one takes 0.1 s, and connections are worth keeping.

    One that found no credentials never finds any: it is not kept, since an identity may only be busy.
    """
    name = s3.model_dump_json()
    with _clients_lock:
        if name in _clients:
            return _clients[name]
        session = _new_session()
        found = session.get_credentials() is not None  # asked first: the client takes what is found here
        client = _new_client(session, s3)
        if found:
            _clients[name] = client
        return client


def _new_session() -> boto3.session.Session:
    """A session of its own: it finds the credentials of now, and shares nothing with other users of boto3."""
    core = botocore.session.Session()
    core.set_config_variable(_METADATA_TRIES, max(_RETRIES, core.get_config_variable(_METADATA_TRIES)))
    return boto3.session.Session(botocore_session=core)


def _new_client(session: boto3.session.Session, s3: S3Spec) -> S3Client:
    return session.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name=s3.region,
        config=Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": _RETRIES},
            max_pool_connections=_CONNECTIONS,
            s3={
                "addressing_style": "path" if s3.path_style else "auto",
                # The signature does not hash the body: checksums guard it against damage, TLS against people.
                "payload_signing_enabled": False,
            },
            # Servers other than AWS do not know every checksum; ours is sent explicitly.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
