"""The prepared data of a job: its sources, each with samples to train on and samples that are held out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lockstep_api.v1alpha1 import S3Spec, TrainerSpec
from lockstep_trainer.data.module import MODULE, open_module
from lockstep_trainer.data.packing import Concatenated, Packed, Samples, read_pieces
from lockstep_trainer.data.tokens import Extents, LocalShard, RemoteShard, Shard, TokenStream
from lockstep_trainer.storage import open_store


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """Where a token shard lies."""

    store: str  # URI; empty: on disk
    key: str  # or path
    tokens: int


@dataclass(frozen=True, slots=True)
class SourceMeta:
    """One prepared source."""

    name: str
    train: int  # tokens
    holdout: int  # tokens
    width: int  # bytes of an id
    fingerprint: str  # SHA-256 of what came out
    shards: tuple[ShardPlace, ...] = ()  # of a source of tokens


@dataclass(frozen=True, slots=True)
class Meta:
    """What ``meta.json`` says."""

    sources: tuple[SourceMeta, ...]
    end: int  # id of the end of text
    vocabulary: int
    tokenizer: str  # SHA-256
    fingerprint: str  # SHA-256 over tokenizer and all sources: the same in all pods


@dataclass(frozen=True, slots=True)
class Source:
    """One source: what is trained on, and what is only evaluated."""

    name: str
    train: Samples
    holdout: Samples
    fingerprint: str
    streams: tuple[TokenStream, TokenStream] | None  # of tokens, training and held out; none of an own data set


@dataclass(frozen=True, slots=True)
class Corpus:
    """The prepared data of a job."""

    folder: Path
    meta: Meta
    sources: tuple[Source, ...]  # that are trained on, in the order of data.sources
    evaluated: tuple[Source, ...]  # with a whole held-out sample; those of evaluate.sources last
    fingerprint: str  # SHA-256 over tokenizer, packing and the sources that are trained on

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the tokenizer has."""
        return self.meta.vocabulary

    @property
    def end(self) -> int:
        """Id of the end of text."""
        return self.meta.end

    def sizes(self) -> dict[str, int]:
        """Training samples of each source."""
        return {source.name: len(source.train) for source in self.sources}

    def training_tokens(self, at_most: int) -> NDArray[np.int64]:
        """The beginning of each source's training stream, end to end, in proportion to their tokens: for models that
        count."""
        streams = [source.streams[0] for source in self.sources if source.streams]
        total = sum(stream.tokens for stream in streams)
        shares = [stream.tokens * min(at_most, total) // max(1, total) for stream in streams]
        parts = [stream.read(np.array([0]), np.array([share])) for stream, share in zip(streams, shares, strict=True)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def close(self) -> None:
        """End the threads that read from a store."""
        for source in (*self.sources, *self.evaluated):
            source.train.close()
            source.holdout.close()


def open_corpus(folder: Path, spec: TrainerSpec, s3: S3Spec) -> Corpus:
    """The corpus that ``prepare`` left in ``folder``."""
    meta = _read(folder)
    opened = [_open_source(folder, number, spec, meta, s3) for number in range(len(meta.sources))]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if spec.data.module:
        parts = open_module(spec.data, tokenizer, meta.vocabulary)
        trained = [Source(MODULE, parts.train, parts.holdout, parts.fingerprint, None)]
        evaluated = [*trained, *opened]
    else:
        trained, evaluated = opened[: len(spec.data.sources)], opened
    digest = hashlib.sha256(f"{meta.tokenizer} {meta.end} {spec.data.packing} {spec.data.sequence_length}".encode())
    digest.update(f" {spec.data.document_mask}".encode())
    for source in trained:
        digest.update(f" {source.name} {source.fingerprint}".encode())
    with_samples = tuple(source for source in evaluated if len(source.holdout))
    return Corpus(folder, meta, tuple(trained), with_samples, digest.hexdigest())


def _open_source(folder: Path, number: int, spec: TrainerSpec, meta: Meta, s3: S3Spec) -> Source:
    source = meta.sources[number]
    length = spec.data.sequence_length
    streams: list[TokenStream] = []
    samples: list[Samples] = []
    for part in ("train", "holdout"):
        name = f"{number}-{part}"
        stream = _stream(folder, name, source, s3)
        streams.append(stream)
        if spec.data.packing == "bestFit":
            pieces = read_pieces(folder / f"{name}.pieces")
            samples.append(Packed(stream, length, pieces, meta.end))
        else:
            samples.append(Concatenated(stream, length))
    return Source(source.name, samples[0], samples[1], source.fingerprint, (streams[0], streams[1]))


def _stream(folder: Path, name: str, source: SourceMeta, s3: S3Spec) -> TokenStream:
    if not source.shards:
        shard = LocalShard(folder / f"{name}.tokens", source.width)
        return TokenStream([shard], Extents.whole([len(shard.ids)]))
    shards: list[Shard] = [
        RemoteShard(open_store(place.store, s3), place.key, source.width)
        if place.store
        else LocalShard(Path(place.key), source.width)
        for place in source.shards
    ]
    return TokenStream(shards, Extents(*np.load(folder / f"{name}.extents.npy")))


def _read(folder: Path) -> Meta:
    found = json.loads((folder / "meta.json").read_text())
    sources = tuple(
        SourceMeta(**{**source, "shards": tuple(ShardPlace(**place) for place in source["shards"])})
        for source in found.pop("sources")
    )
    return Meta(sources=sources, **found)
