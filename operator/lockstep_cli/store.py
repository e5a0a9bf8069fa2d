"""Finds a run's journal: in a folder, in S3, or in the working folder of ``lockstep run``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from lockstep_api.v1alpha1 import S3Spec, TrainingJob
from lockstep_cli.errors import CliError, NotFoundError
from lockstep_cli.journal import Source, parse_lines

if TYPE_CHECKING:
    from lockstep_trainer.storage.store import ObjectStore


_WILDCARDS = frozenset("*?[")
_ADVICE = "is AWS_ACCESS_KEY_ID set, and --endpoint given where the server is reached at another address?"


class StoreSource:
    """An object store, read: names instead of entries, and sentences instead of the trainer's errors."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def get(self, key: str) -> tuple[bytes, str]:
        """Content and ETag of an object."""
        with sentences(self._store.uri, _ADVICE):
            return self._store.get(key)

    def list(self, prefix: str) -> Iterable[str]:
        """Keys that begin with ``prefix``, sorted. Folders below it that may not be read are passed over."""
        with sentences(self._store.uri, _ADVICE):
            return [entry.key for entry in self._store.list(prefix, readable=True)]


@contextmanager
def sentences(uri: str, advice: str) -> Iterator[None]:
    """Errors of the store at ``uri`` as those of this tool; of one in S3 with ``advice`` on how to reach it."""
    from lockstep_trainer.errors import StoreError

    try:
        yield
    except StoreError as error:
        raise CliError(f"{error}; {advice}" if uri.startswith("s3://") else str(error)) from None


def as_uri(place: str) -> str:
    """``place`` itself where it is a URI, else that of the path that it is."""
    return place if "://" in place else Path(place).expanduser().absolute().as_uri()


def as_pattern(place: str) -> str:
    """``as_uri`` of a path whose wildcards are to remain: they are what a source's uri has them for."""
    if "://" in place:
        return place
    path = Path(place).expanduser()
    *folders, _ = path.parts or ("",)
    fixed = list(takewhile(lambda part: not _WILDCARDS.intersection(part), folders))
    return "/".join([as_uri(str(Path(*fixed))).removesuffix("/"), *path.parts[len(fixed) :]])


def folder_of(uri: str) -> Path:
    """The folder that a file:// URI names."""
    return Path(unquote(uri.removeprefix("file://")))


def open_uri(uri: str, s3: S3Spec | None = None) -> Source:
    """The store at ``s3://bucket/prefix``, ``file:///folder`` or a plain path."""
    from lockstep_trainer.storage.store import open_store  # boto3 takes 0.3 s: only for those who read a store

    if uri.startswith("s3://"):
        spec = s3 or S3Spec()
        endpoint = spec.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return StoreSource(open_store(uri, spec.model_copy(update={"endpoint": endpoint})))
    root = folder_of(as_uri(uri)).absolute()
    if not root.is_dir():
        raise NotFoundError(f"{uri}: no such folder")
    return StoreSource(open_store(root.as_uri()))


def find_runs(source: Source, uri: str) -> list[str]:
    """Prefixes of the runs below ``uri``, the newest first: "" for a journal that is right there. At least one; raises
    NotFoundError."""
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
    return sorted(prefixes, key=lambda prefix: _newest(source, prefixes[prefix]), reverse=True)


def _newest(source: Source, keys: list[str]) -> float:
    lines = parse_lines(source.get(keys[-1])[0])
    return max((float(line.get("at", 0)) for line in lines), default=0.0)


def run_uri(job: TrainingJob) -> str:
    """Where a job keeps its checkpoints and journal; raises NotFoundError for a job that keeps none."""
    if job.spec.checkpoint is None:
        raise NotFoundError(f"{job.name}: the job has no checkpoint.uri, so there is no journal to read")
    return f"{job.spec.checkpoint.uri.rstrip('/')}/{job.namespace}/{job.name}/{job.uid}"
