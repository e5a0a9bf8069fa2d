"""Which files a job reads.

The choice depends on nothing but names and sizes, in sorted order, so that every pod makes the same one.
"""

from __future__ import annotations

import fnmatch
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from lockstep_api.v1alpha1 import DataSource, S3Spec
from lockstep_trainer.errors import UserError
from lockstep_trainer.storage import ObjectStore, open_store

STDLIB = "{stdlib}"
_WILDCARD = re.compile(r"[*?\[]")
_NEVER = ("site-packages/**", "dist-packages/**", "**/__pycache__/**")
"""Left out of {stdlib}: installed packages differ from machine to machine, byte code is no text."""
_PACKED = re.compile(
    r"\.(bz2|xz|lzma|lz4|snappy|Z|zip|7z|rar|tar|tgz|tbz2?|txz|tzst)$|\.(tar|parquet|tokens)\.(gz|zst)$"
)
"""Endings of files whose text can't be read as they are: another compression, or an archive of many files. None that
plain text has, too: corpora name files by their language, and .br is Breton."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    source: str  # name of the source
    path: str  # below the source's fixed part, with /
    size: int  # bytes
    root: ObjectStore
    format: str = "auto"  # of DataSource
    field: str = "text"

    @property
    def uri(self) -> str:
        """Where it lies, for messages."""
        return f"{self.root.uri}/{self.path}"

    def read(self) -> bytes:
        """All of it."""
        return self.root.get(self.path)[0]


def find_files(
    sources: Sequence[DataSource], s3: S3Spec, field: str = "trainer.data.sources[{}].uri"
) -> list[SourceFile]:
    """All files of all sources, in their order; raises UserError where a source has none, or one that is packed so that
    its text can't be read, naming ``field`` with the source's number in place of {}. What the source says is text is
    not packed."""
    files: list[SourceFile] = []
    for number, source in enumerate(sources):
        found = list(_files_of(source, s3))
        if not found:
            raise UserError(
                f"{field.format(number)}: {source.uri} matches no file in this pod (after exclude); "
                "check the path, the volume, and the wildcards (** crosses folders, * does not)"
            )
        packed = next((file for file in found if _PACKED.search(file.path)), None)
        if packed and source.format in ("auto", "jsonl"):
            raise UserError(
                f"{field.format(number)}: {packed.uri} is packed; unpack it, or leave it out with exclude (text and "
                "JSON lines in .gz or .zst are read as they are); if it is plain text, set format: text"
            )
        files += found
    return files


def _files_of(source: DataSource, s3: S3Spec) -> Iterator[SourceFile]:
    uri = source.uri
    excluded = list(source.exclude)
    if STDLIB in uri:
        uri = uri.replace(STDLIB, sysconfig.get_paths()["stdlib"])
        excluded += _NEVER
    root, pattern = split(uri)
    wanted = glob_regex(pattern)
    unwanted = [glob_regex(each) for each in excluded]
    taken = 0
    store = open_store(root, s3)
    for path, size in _listing(root, store, [each for each in unwanted if each.pattern.endswith(".*")]):
        if not wanted.fullmatch(path) or any(each.fullmatch(path) for each in unwanted):
            continue
        if source.max_bytes is not None and taken + size > source.max_bytes:
            return
        taken += size
        yield SourceFile(source.name, path, size, store, source.format, source.field)


def split(uri: str) -> tuple[str, str]:
    """The folder in front of the first wildcard, and the pattern below it."""
    parts = uri.split("/")
    for index, part in enumerate(parts):
        if index > 2 and _WILDCARD.search(part):
            return "/".join(parts[:index]), "/".join(parts[index:])
    return "/".join(parts[:-1]), parts[-1]


def _listing(root: str, store: ObjectStore, pruned: list[re.Pattern[str]]) -> list[tuple[str, int]]:
    """All files below ``root`` as (path, size), sorted by path; folders that ``pruned`` leaves out are not read."""
    parts = urlsplit(root)
    if parts.scheme != "file":
        return [(entry.key, entry.size) for entry in store.list()]
    return sorted(_walk(unquote(parts.path), "", pruned))


def _walk(top: str, below: str, pruned: list[re.Pattern[str]]) -> Iterator[tuple[str, int]]:
    try:
        entries = list(os.scandir(f"{top}/{below}"))
    except OSError:  # no such folder, or not ours to read: an empty source is reported with its URI
        return
    for entry in entries:
        path = f"{below}{entry.name}"
        if entry.is_file():
            yield path, entry.stat().st_size
        elif entry.is_dir(follow_symlinks=False) and not any(each.fullmatch(f"{path}/") for each in pruned):
            yield from _walk(top, f"{path}/", pruned)


def glob_regex(pattern: str) -> re.Pattern[str]:
    """A path pattern as a regular expression: ``**`` crosses folders (none included), ``*`` and ``?`` stay in one."""
    pieces = []
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern):
        match part:
            case "**/":
                pieces.append(r"(?:.*/)?")
            case "**":
                pieces.append(r".*")
            case "*":
                pieces.append(r"[^/]*")
            case "?":
                pieces.append(r"[^/]")
            case _ if part.startswith("["):
                pieces.append(fnmatch.translate(part).removeprefix("(?s:").rsplit(")", 1)[0])
            case _:
                pieces.append(re.escape(part))
    return re.compile("".join(pieces))
