"""Tokens of the job's text, made once per pod and mapped by all its workers.

    data/<key>/tokenizer.json
               train.tokens       token ids, uint16 or uint32 little-endian, END_OF_TEXT behind each file
               holdout.tokens     the same of the held-out files
               meta.json          counts, width of an id, fingerprint

``key`` names what goes in (the configuration, the files with their sizes), so a restart in the same pod finds
everything done, and the fingerprint what came out: it must be the same in all pods, or they would train on different
text without a word.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lockstep_api.v1alpha1 import S3Spec, TrainerSpec
from lockstep_trainer.data.sources import TextFile, find_files
from lockstep_trainer.data.tokenizer import end_of_text, load_tokenizer, train_tokenizer
from lockstep_trainer.errors import UserError

_BATCH = 256  # files tokenized at once: enough for all threads, little enough to hold in memory
_FORMAT = 1  # raised when the files or their meaning change


@dataclass(frozen=True, slots=True)
class Meta:
    """What ``meta.json`` says."""

    train: int  # tokens
    holdout: int  # tokens
    width: int  # bytes of an id
    fingerprint: str  # SHA-256 over tokenizer and both token files


@dataclass(frozen=True, slots=True)
class Corpus:
    """The prepared tokens, mapped from disk."""

    folder: Path
    meta: Meta
    train: NDArray[np.uint16] | NDArray[np.uint32]
    holdout: NDArray[np.uint16] | NDArray[np.uint32]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made them."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the tokenizer has."""
        return self.tokenizer().get_vocab_size()


def prepare(spec: TrainerSpec, s3: S3Spec, data_dir: Path) -> Corpus:
    """The job's corpus, prepared if no worker of this pod has done it yet; others wait.

    Raises UserError where the text is missing or too short, StoreError where it can't be read.
    """
    files = find_files(spec.data.sources, s3)
    folder = data_dir / _key(spec, files)
    data_dir.mkdir(parents=True, exist_ok=True)
    with _locked(data_dir / f"{folder.name}.lock"):
        if not folder.exists():
            _prepare(spec, s3, files, folder)
    return _open(folder)


def samples_in(tokens: int, sequence_length: int) -> int:
    """How many samples a stream of ``tokens`` holds: pieces of ``sequence_length`` + 1 that overlap by one token."""
    return max(0, tokens - 1) // sequence_length


def sample_batch(
    tokens: NDArray[np.uint16] | NDArray[np.uint32], samples: NDArray[np.int64], sequence_length: int
) -> NDArray[np.int64]:
    """Tokens of these samples, shape (len(samples), sequence_length + 1): inputs and, one further, targets."""
    starts = samples[:, None] * sequence_length
    batch: NDArray[np.int64] = tokens[starts + np.arange(sequence_length + 1)].astype(np.int64)
    return batch


# ----------------------------------------------------------------------------------------------------------------


def _prepare(spec: TrainerSpec, s3: S3Spec, files: Sequence[TextFile], folder: Path) -> None:
    held_out = [file for file in files if file.held_out(spec.data.holdout)]
    training = [file for file in files if not file.held_out(spec.data.holdout)]
    _check(spec, training, held_out)
    building = folder.with_name(f".{folder.name}")
    shutil.rmtree(building, ignore_errors=True)  # of a worker that was killed while it prepared
    building.mkdir()
    if spec.tokenizer.train is not None:
        tokenizer = train_tokenizer((file.read() for file in training), spec.tokenizer.train)
    else:
        assert spec.tokenizer.uri is not None
        tokenizer = load_tokenizer(spec.tokenizer.uri, s3)
    tokenizer.save(str(building / "tokenizer.json"))
    end = end_of_text(tokenizer)
    dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4")
    counts = {
        name: _write_tokens(building / f"{name}.tokens", tokenizer, end, dtype, part)
        for name, part in (("train", training), ("holdout", held_out))
    }
    fingerprint = hashlib.sha256()
    for name in ("tokenizer.json", "train.tokens", "holdout.tokens"):
        with (building / name).open("rb") as file:
            fingerprint.update(hashlib.file_digest(file, "sha256").digest())
    meta = Meta(counts["train"], counts["holdout"], dtype.itemsize, fingerprint.hexdigest())
    (building / "meta.json").write_text(json.dumps(asdict(meta)))
    building.rename(folder)


def _check(spec: TrainerSpec, training: Sequence[TextFile], held_out: Sequence[TextFile]) -> None:
    if not training:
        raise UserError("trainer.data: no file is left to train on; lower trainer.data.holdout or add text")
    if spec.evaluate and not held_out:
        raise UserError(
            f"trainer.data.holdout: {spec.data.holdout} of {len(training)} files holds out none; raise it, or add files"
        )


def _write_tokens(
    path: Path, tokenizer: Tokenizer, end: int, dtype: np.dtype[np.unsignedinteger], files: Sequence[TextFile]
) -> int:
    count = 0
    with path.open("wb") as out:
        for batch in _batches(files):
            for encoding in tokenizer.encode_batch([file.read() for file in batch], add_special_tokens=False):
                ids = np.array([*encoding.ids, end], dtype)
                out.write(ids.tobytes())
                count += len(ids)
    return count


def _batches(files: Sequence[TextFile]) -> Iterator[Sequence[TextFile]]:
    for start in range(0, len(files), _BATCH):
        yield files[start : start + _BATCH]


def _key(spec: TrainerSpec, files: Iterable[TextFile]) -> str:
    """Names everything that goes in. Python's version counts since {stdlib} is its text."""
    digest = hashlib.sha256(f"{_FORMAT} {sys.version}\n".encode())
    digest.update(spec.tokenizer.model_dump_json().encode())
    digest.update(f"{spec.data.holdout}\n".encode())
    for file in files:
        digest.update(f"{file.root.uri}\0{file.source}\0{file.path}\0{file.size}\n".encode())
    return digest.hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process of the pod; the kernel releases it when that process ends, however it ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open(folder: Path) -> Corpus:
    meta = Meta(**json.loads((folder / "meta.json").read_text()))
    dtype = np.dtype("<u2" if meta.width == 2 else "<u4")
    return Corpus(folder, meta, _map(folder / "train.tokens", dtype), _map(folder / "holdout.tokens", dtype))


def _map(path: Path, dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.uint16] | NDArray[np.uint32]:
    if path.stat().st_size == 0:  # mmap refuses empty files
        return np.empty(0, np.uint16)
    return np.memmap(path, dtype, mode="r")
