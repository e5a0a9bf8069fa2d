"""Reads the objects of a run, from a folder or from S3."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class Objects(Protocol):
    """Named blobs."""

    def names(self) -> list[str]:
        """All names, sorted."""
        ...

    def read(self, key: str) -> bytes:
        """Content; raises KeyError."""
        ...


class FolderObjects:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        """Relative paths of all files."""
        return sorted(path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if path.is_file())

    def read(self, key: str) -> bytes:
        """Content of a file."""
        try:
            return (self._root / key).read_bytes()
        except FileNotFoundError:
            raise KeyError(key) from None


class BucketObjects:
    """Objects below a prefix of a bucket. Credentials, region and endpoint come from AWS_… or the argument."""

    def __init__(self, uri: str, endpoint: str | None = None) -> None:
        import boto3
        from botocore.config import Config

        self._bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self._prefix = prefix.strip("/") + "/"
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint or os.environ.get("AWS_ENDPOINT_URL"),
            region_name=os.environ.get("AWS_REGION", "us-east-1"),
            config=Config(s3={"addressing_style": "path"}),
        )

    def names(self) -> list[str]:
        """Keys without the prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        return sorted(item["Key"].removeprefix(self._prefix) for page in pages for item in page.get("Contents", ()))

    def read(self, key: str) -> bytes:
        """Content of an object."""
        try:
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"].read()
        except self._client.exceptions.NoSuchKey:
            raise KeyError(key) from None


class MemoryObjects(dict[str, bytes]):
    """Blobs in memory, for the checker's own tests."""

    def names(self) -> list[str]:
        """All names."""
        return sorted(self)

    def read(self, key: str) -> bytes:
        """Content."""
        return self[key]


def open_uri(uri: str, endpoint: str | None = None) -> Objects:
    """The run at ``s3://bucket/prefix/<namespace>/<job>/<uid>``, ``file:///…`` or a path."""
    if uri.startswith("s3://"):
        return BucketObjects(uri, endpoint)
    return FolderObjects(Path(uri.removeprefix("file://")))
