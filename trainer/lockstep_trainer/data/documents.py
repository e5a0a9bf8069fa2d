"""Documents out of files, one at a time: a file is read in pieces and never held whole, unless it is one document."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, cast

from lockstep_trainer.data.sources import SourceFile
from lockstep_trainer.errors import UserError
from lockstep_trainer.storage import ObjectStore

_READ_BYTES = 4 << 20  # of one request to the store
_BATCH_DOCUMENTS = 256  # tokenized at once: enough for all threads
_BATCH_CHARACTERS = 8 << 20  # and little enough to hold in memory
_ROWS = 1024  # of a Parquet file that are decoded at once
_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tokens": "tokens"}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and where it comes from."""

    source: str  # name of the source
    place: str  # path of the file, with #row where it has several documents
    text: str

    def held_out(self, share: float) -> bool:
        """Whether it is kept out of training: by a hash of its place, the same everywhere."""
        return held_out(self.source, self.place, share)


def held_out(source: str, place: str, share: float) -> bool:
    """Whether the document at ``place`` belongs to the ``share`` of a source that is kept out of training."""
    digest = hashlib.sha256(f"{source}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


def format_of(file: SourceFile) -> str:
    """text, jsonl, parquet or tokens: as the source says, or by the file's ending, that of its compression aside."""
    if file.format != "auto":
        return file.format
    path = file.path.rpartition(".")[0] if _compression(file) else file.path
    return next((kind for ending, kind in _ENDINGS.items() if path.endswith(ending)), "text")


def documents(file: SourceFile) -> Iterator[Document]:
    """The file's documents in order.

    Text and JSON lines that end in .gz or .zst are decompressed; UserError where such a file is cut off or damaged. A
    text file that is not UTF-8 has its wrong bytes replaced, as old sources of every language have some. Rows are
    stricter: UserError, naming file and row, where one is no JSON object, or has no text in the source's field. A null
    or an empty text is passed over.
    """
    match format_of(file):
        case "text":
            yield Document(file.source, file.path, _whole(file).decode("utf-8", errors="replace"))
        case "jsonl":
            yield from _jsonl(file)
        case "parquet":
            yield from _parquet(file)
        case other:
            raise UserError(f"trainer.data.sources: {file.uri} holds {other}, which is no text")


def batches_of(found: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in groups that are tokenized at once."""
    batch: list[Document] = []
    characters = 0
    for document in found:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _whole(file: SourceFile) -> bytes:
    if not _compression(file):
        return file.read()
    with _decompressed(file) as content:
        return content.read()


def _jsonl(file: SourceFile) -> Iterator[Document]:
    with _decompressed(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                raise UserError(
                    f"trainer.data.sources: row {number} of {file.uri} is no JSON: {error}; correct it, or set "
                    "format: text if this is no JSONL"
                ) from None
            if not isinstance(row, dict) or file.field not in row:
                raise _without_field(file, number, list(row) if isinstance(row, dict) else [])
            yield from _row(file, number, row[file.field])


def _parquet(file: SourceFile) -> Iterator[Document]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        # Without threads: reading ahead is the store's business, and worker processes have few cores each.
        table = parquet.ParquetFile(io.BufferedReader(_Ranges(file.root, file.path, file.size), _READ_BYTES))
        if file.field not in table.schema_arrow.names:
            raise _without_field(file, 1, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(_ROWS, columns=[file.field], use_threads=False):
            for text in batch.column(0).to_pylist():
                number += 1
                yield from _row(file, number, text)
    except pyarrow.ArrowException as error:
        raise UserError(f"trainer.data.sources: {file.uri} is no Parquet file that can be read: {error}") from None


def _row(file: SourceFile, number: int, text: Any) -> Iterator[Document]:
    if text is None or text == "":
        return
    if not isinstance(text, str):
        raise UserError(
            f"trainer.data.sources: row {number} of {file.uri}: {file.field} is a {type(text).__name__} and no text; "
            "name another field"
        )
    yield Document(file.source, f"{file.path}#{number}", text)


def _without_field(file: SourceFile, number: int, fields: list[str]) -> UserError:
    has = f"it has {', '.join(fields[:10])}" if fields else "it is no object"
    return UserError(
        f"trainer.data.sources: row {number} of {file.uri} has no {file.field} ({has}); set the source's field"
    )


def _compression(file: SourceFile) -> str | None:
    return _COMPRESSED.get(PurePosixPath(file.path).suffix)


@contextmanager
def _decompressed(file: SourceFile) -> Iterator[IO[bytes]]:
    """The file's content, read in pieces; raises UserError where it is cut off or damaged."""
    compression = _compression(file)
    with io.BufferedReader(_Ranges(file.root, file.path, file.size), _READ_BYTES) as raw:
        if compression is None:
            yield raw
            return
        try:
            with _decompressor(raw, compression) as content:
                yield content
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(
                f"trainer.data.sources: {file.uri} is no whole {compression} file: {error}; write it again"
            ) from None


def _decompressor(raw: IO[bytes], compression: str) -> IO[bytes]:
    if compression == "gzip":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, compression), _READ_BYTES)


class _Ranges(io.RawIOBase):
    """An object of a store as a file, read by ranges."""

    def __init__(self, store: ObjectStore, key: str, size: int) -> None:
        self._store, self._key, self._size, self._at = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        data = self._store.get_range(self._key, self._at, wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
