"""Checkpoints: durable ones in the store, snapshots in memory."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from lockstep_api.v1alpha1.base import Model, Uri, cel

_STEPS_OR_AUTO = "write a number of steps from 1 on, or auto"


def _steps_or_auto(value: object) -> object:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(_STEPS_OR_AUTO)
    return value


StepsOrAuto = Annotated[
    int | Literal["auto"],
    BeforeValidator(_steps_or_auto),
    Field(
        json_schema_extra={
            "x-kubernetes-int-or-string": True,
            "x-kubernetes-validations": [
                {"rule": "type(self) == int ? self >= 1 : self == 'auto'", "message": _STEPS_OR_AUTO}
            ],
        }
    ),
]
"""Steps, or ``auto``: chosen from what is measured while the job runs."""

_UNITS = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
}  # fmt: skip
_QUANTITY = r"^(\d+(?:\.\d+)?)([kMGTP]|[KMGTP]i)?$"

Quantity = Annotated[str, StringConstraints(pattern=_QUANTITY, max_length=32), Field(examples=["64Gi", "500M"])]
"""Bytes as Kubernetes writes them: ``64Gi``, ``500M``."""

Rate = Annotated[
    str,
    StringConstraints(pattern=r"^[1-9]\d*(?:\.\d+)?([kMGTP]|[KMGTP]i)?$", max_length=32),
    Field(examples=["500Mi", "2G"]),
]
"""Bytes per second, written like a ``Quantity``, not zero."""

_KEY_NEEDS_KMS = "kmsKeyId needs the type aws:kms"


def quantity_bytes(quantity: str) -> int:
    """Bytes of a ``Quantity``."""
    match = re.fullmatch(_QUANTITY, quantity)
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity of bytes; write it like 64Gi")
    return int(Decimal(match[1]) * _UNITS[match[2] or ""])


class SecretReference(Model):
    """A Secret in the job's namespace."""

    name: str = Field(min_length=1, max_length=253)
    """Name of the Secret; keys accessKeyId and secretAccessKey."""


class EncryptionSpec(Model):
    """Encryption by the store itself."""

    type: Literal["AES256", "aws:kms"]
    """Keys of S3, or of the key management service."""
    kms_key_id: str | None = Field(default=None, min_length=1, max_length=2048)
    """Key of the key management service, by identifier or ARN. Without it the account's default."""

    model_config = cel(("!has(self.kmsKeyId) || self.type == 'aws:kms'", _KEY_NEEDS_KMS))

    @model_validator(mode="after")
    def _key_needs_kms(self) -> EncryptionSpec:
        if self.kms_key_id is not None and self.type != "aws:kms":
            raise ValueError(_KEY_NEEDS_KMS)
        return self


class S3Spec(Model):
    """How the object store is reached."""

    endpoint: str | None = Field(default=None, max_length=1024)
    """URL of an S3 server that is not AWS."""
    region: str = Field(default="us-east-1", max_length=63)
    """Region."""
    path_style: bool = False
    """Bucket in the path and not in the host name. At an endpoint of your own it always is."""
    secret_ref: SecretReference | None = None
    """Credentials; without it the pod's own identity is used."""
    encryption: EncryptionSpec | None = None
    """Encryption of all that is written. Without it what the bucket's own settings say."""
    upload_bandwidth: Rate | None = None
    """Bytes per second that each pod may upload, for example 500Mi. Without it as fast as it goes."""

    @property
    def upload_bytes_per_second(self) -> int | None:
        """The bandwidth in bytes per second."""
        return None if self.upload_bandwidth is None else quantity_bytes(self.upload_bandwidth)


class KeepSpec(Model):
    """Which checkpoints stay. The newest whole one always does."""

    last: int = Field(default=3, ge=1, le=10_000)
    """The newest so many."""
    every: int | None = Field(default=None, ge=1)
    """Steps between those that stay for good: the first one at or behind each multiple. Without it none does."""


class MemorySpec(Model):
    """Snapshots in the memory of the pods, from which a job goes on after a fault without asking the store."""

    every: StepsOrAuto = "auto"
    """Steps between snapshots. auto: as often as they cost less than 1 % of the time."""
    buddy: bool = True
    """A second copy in the memory of a pod on another node, so that the loss of a node loses no snapshot."""
    limit: Quantity | None = None
    """Memory of a pod that snapshots may take, for example 64Gi. Without it what the pod's memory-backed volume holds.
    A job whose snapshots need more is refused with the numbers."""

    @property
    def interval(self) -> int | None:
        """Steps between snapshots; None for auto."""
        return None if self.every == "auto" else self.every

    @property
    def limit_bytes(self) -> int | None:
        """The limit in bytes."""
        return None if self.limit is None else quantity_bytes(self.limit)


class CheckpointSpec(Model):
    """Checkpoints."""

    uri: Uri
    """Bucket and prefix (s3://…), or a folder that all pods share (file://…)."""
    every: StepsOrAuto = 1000
    """Steps between durable checkpoints; the last step always gets one. auto: chosen from what a checkpoint costs and
    how often something breaks, so that the least time is lost; the numbers are in status.checkpoint.interval."""
    memory: MemorySpec = Field(default_factory=MemorySpec)
    """Snapshots in memory."""
    keep: KeepSpec = Field(default_factory=KeepSpec)
    """Retention."""
    resume_from: Uri | None = None
    """A manifest.json of another job to start from. Without it a new job starts fresh. Nothing tells that job's
    retention: keep.every, or a copy, keeps the manifest there."""
    s3: S3Spec = Field(default_factory=S3Spec)
    """Object store."""

    @property
    def interval(self) -> int | None:
        """Steps between durable checkpoints; None for auto."""
        return None if self.every == "auto" else self.every
