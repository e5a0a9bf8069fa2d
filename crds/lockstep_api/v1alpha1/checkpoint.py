"""Durable checkpoints."""

from __future__ import annotations

from pydantic import Field

from lockstep_api.v1alpha1.base import Model, Uri


class SecretReference(Model):
    """A Secret in the job's namespace."""

    name: str = Field(min_length=1, max_length=253)
    """Name of the Secret; keys accessKeyId and secretAccessKey."""


class S3Spec(Model):
    """How the object store is reached."""

    endpoint: str | None = Field(default=None, max_length=1024)
    """URL of an S3 server that is not AWS."""
    region: str = Field(default="us-east-1", max_length=63)
    """Region."""
    path_style: bool = False
    """Bucket in the path and not in the host name."""
    secret_ref: SecretReference | None = None
    """Credentials; without it the pod's own identity is used."""


class KeepSpec(Model):
    """Which checkpoints stay. The newest verified one always does."""

    last: int = Field(default=3, ge=1, le=10_000)
    """The newest so many."""


class CheckpointSpec(Model):
    """Durable checkpoints."""

    uri: Uri
    """Bucket and prefix (s3://…), or a folder that all pods share (file://…)."""
    every: int = Field(default=1000, ge=1)
    """Steps between checkpoints; the last step always gets one."""
    keep: KeepSpec = Field(default_factory=KeepSpec)
    """Retention."""
    resume_from: Uri | None = None
    """A manifest.json of another job to start from. Without it a new job starts fresh."""
    s3: S3Spec = Field(default_factory=S3Spec)
    """Object store."""
