"""Finds a run's journal: in a folder, in S3, or in the working folder of ``lockstep run``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lockstep_api.v1alpha1 import S3Spec, TrainingJob
from lockstep_cli.errors import CliError, NotFoundError
from lockstep_cli.journal import Source


@dataclass(frozen=True, slots=True)
class Folder:
    """Reads a folder as an object store."""

    root: Path

    def get(self, key: str) -> tuple[bytes, str]:
        """Content of a file."""
        return (self.root / key).read_bytes(), ""

    def list(self, prefix: str) -> Iterable[str]:
        """Files whose path below the root begins with ``prefix``, sorted."""
        start = self.root / prefix
        folder = start if prefix.endswith("/") or not prefix else start.parent
        if not folder.is_dir():
            return []
        paths = (path.relative_to(self.root).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
        return [path for path in paths if path.startswith(prefix)]


class Bucket:
    """Reads a bucket below a prefix."""

    def __init__(self, uri: str, s3: S3Spec) -> None:
        import boto3  # 0.3 s: only for those who need it
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        name, _, prefix = uri.removeprefix("s3://").partition("/")
        self._bucket, self._prefix = name, prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._errors = (BotoCoreError, ClientError)
        self._client = boto3.client(
            "s3",
            endpoint_url=s3.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
            region_name=s3.region,
            config=Config(
                s3={"addressing_style": "path" if s3.path_style else "auto"},
                connect_timeout=5,
                retries={"max_attempts": 3},
            ),
        )

    def get(self, key: str) -> tuple[bytes, str]:
        """Content and ETag of an object."""
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            return answer["Body"].read(), answer["ETag"]
        except self._errors as error:
            raise self._problem(error) from None

    def list(self, prefix: str) -> Iterable[str]:
        """Keys below the root that begin with ``prefix``, sorted."""
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            return [item["Key"].removeprefix(self._prefix) for page in pages for item in page.get("Contents", ())]
        except self._errors as error:
            raise self._problem(error) from None

    def _problem(self, error: Exception) -> CliError:
        return CliError(
            f"s3://{self._bucket}/{self._prefix}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and give "
            "--endpoint where the server is not AWS"
        )


def open_uri(uri: str, s3: S3Spec | None = None) -> Source:
    """The store at ``s3://bucket/prefix``, ``file:///folder`` or a plain path."""
    if uri.startswith("s3://"):
        return Bucket(uri, s3 or S3Spec())
    root = Path(uri.removeprefix("file://")).expanduser()
    if not root.is_dir():
        raise NotFoundError(f"{uri}: no such folder")
    return Folder(root)


def find_run(source: Source, uri: str) -> str:
    """Prefix of the run below ``uri``: "" when the journal is right there, else the newest of those further down."""
    prefixes: dict[str, list[str]] = {}
    for key in source.list(""):
        before, separator, after = f"/{key}".rpartition("/journal/")
        if separator and after.endswith(".jsonl"):
            prefixes.setdefault(f"{before[1:]}/" if before else "", []).append(key)
    if not prefixes:
        raise NotFoundError(
            f"{uri}: no journal below it; give checkpoint.uri of a job that has trained, or "
            "<checkpoint.uri>/<namespace>/<job>/<uid>"
        )
    return max(prefixes, key=lambda prefix: _newest(source, prefixes[prefix]))


def _newest(source: Source, keys: list[str]) -> float:
    from lockstep_cli.journal import parse_lines

    lines = parse_lines(source.get(keys[-1])[0])
    return max((float(line.get("at", 0)) for line in lines), default=0.0)


def run_uri(job: TrainingJob) -> str:
    """Where a job keeps its checkpoints and journal; raises NotFoundError for a job that keeps none."""
    if job.spec.checkpoint is None:
        raise NotFoundError(f"{job.name}: the job has no checkpoint.uri, so there is no journal to read")
    return f"{job.spec.checkpoint.uri.rstrip('/')}/{job.namespace}/{job.name}/{job.uid}"
