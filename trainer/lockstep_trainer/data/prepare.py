"""Tokens of the job's data, made once per pod and mapped by all its workers.

    data/<key>/tokenizer.json
               meta.json            counts and fingerprints
               <n>-train.tokens     shards of source n (``tokens``); a source of tokens keeps its own shards where
               <n>-holdout.tokens   they are and has <n>-train.extents.npy and <n>-holdout.extents.npy instead
               <n>-train.pieces.*   with bestFit: what lies in which sample (``packing``)

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
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer

from lockstep_api.v1alpha1 import DataSource, S3Spec, TrainerSpec
from lockstep_trainer.data.corpus import Corpus, Meta, SourceMeta, open_corpus
from lockstep_trainer.data.documents import batches_of, documents, format_of
from lockstep_trainer.data.packing import write_pieces
from lockstep_trainer.data.progress import Progress
from lockstep_trainer.data.shards import use_shards
from lockstep_trainer.data.sources import SourceFile, find_files
from lockstep_trainer.data.tokenizer import (
    end_of_text,
    load_config,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from lockstep_trainer.data.tokens import LocalShard, ShardMeta, ShardWriter, read_meta, width_for
from lockstep_trainer.errors import PreconditionFailed, UserError
from lockstep_trainer.storage import ObjectStore

TRAINING_CHARACTERS = 1 << 30
"""Of text that a tokenizer is trained on at most, in equal parts from all sources: more changes nothing, and takes
memory."""
_FORMAT = 3  # raised when the files or their meaning change
_AGREED = 2  # the same for the tokenizer that the pods of a job agree on
PARTS = ("train", "holdout")

__all__ = ["Corpus", "prepare"]


def prepare(spec: TrainerSpec, s3: S3Spec, data_dir: Path, shared: ObjectStore | None = None) -> Corpus:
    """The job's corpus, prepared if no worker of this pod has done it yet; others wait.

    ``shared`` is a store that all pods of the job see: through it they agree on a tokenizer whose training does not
    give the same bits twice (unigram). Raises UserError where the text is missing or too short, to train on or to
    evaluate, StoreError where it can't be read.
    """
    files = _Files(spec, s3)
    key = _key(spec, files, _FORMAT)
    folder = data_dir / key
    data_dir.mkdir(parents=True, exist_ok=True)
    with _locked(data_dir / f"{folder.name}.lock"):
        if not folder.exists():
            _Preparation(spec, s3, files, folder, shared).run()
    corpus = open_corpus(folder, spec, s3)
    if spec.evaluate and not corpus.evaluated:  # said now, not behind the first steps or the last one
        raise _nothing_to_evaluate(spec, corpus)
    return corpus


def _nothing_to_evaluate(spec: TrainerSpec, corpus: Corpus) -> UserError:
    data = spec.data
    if data.module and not (spec.evaluate and spec.evaluate.sources):
        (samples,) = corpus.sizes().values()
        return UserError(
            f"trainer.data.holdout: {data.holdout} of the {samples} samples of {data.module} holds out none; raise it, "
            "add samples, or set trainer.evaluate.sources"
        )
    return UserError(
        f"trainer.data.holdout: no source has {data.sequence_length + 1} held-out tokens, which one sample takes; "
        "raise it, add text, or set trainer.evaluate.sources"
    )


class _Files:
    """The sources of a job with their files: those that are trained on first, then those that are only evaluated."""

    def __init__(self, spec: TrainerSpec, s3: S3Spec) -> None:
        trained = (
            []
            if spec.data.module and not (spec.tokenizer.train and spec.tokenizer.train.kind != "bytes")
            else (spec.data.sources)
        )
        evaluated = spec.evaluate.sources if spec.evaluate else []
        self.trained = _by_source(trained, find_files(trained, s3))
        self.evaluated = _by_source(evaluated, find_files(evaluated, s3, "trainer.evaluate.sources[{}].uri"))

    def __iter__(self) -> Iterator[SourceFile]:
        for group in (self.trained, self.evaluated):
            for files in group.values():
                yield from files


def _by_source(sources: Sequence[DataSource], files: Iterable[SourceFile]) -> dict[str, list[SourceFile]]:
    found: dict[str, list[SourceFile]] = {source.name: [] for source in sources}
    for file in files:
        found[file.source].append(file)
    return found


class _Preparation:
    """One run of it, into a folder that appears when it is whole."""

    def __init__(self, spec: TrainerSpec, s3: S3Spec, files: _Files, folder: Path, shared: ObjectStore | None) -> None:
        self.spec, self.s3, self.files, self.shared = spec, s3, files, shared
        self.folder, self.building = folder, folder.with_name(f".{folder.name}")
        self.progress = Progress()

    def run(self) -> None:
        """Prepare all sources."""
        shutil.rmtree(self.building, ignore_errors=True)  # of a worker that was killed while it prepared
        self.building.mkdir()
        tokenizer, end = self._tokenizer()
        tokenizer.save(str(self.building / "tokenizer.json"))
        self.hash, self.end, self.vocabulary = tokenizer_hash(tokenizer), end, tokenizer.get_vocab_size()
        share = self.spec.data.holdout
        trained = {} if self.spec.data.module else self.files.trained
        sources = [
            self._source(number, name, files, tokenizer, share) for number, (name, files) in enumerate(trained.items())
        ]
        for name, files in self.files.evaluated.items():
            sources.append(self._source(len(sources), name, files, tokenizer, 1.0))
        if trained and not any(source.train for source in sources):
            raise UserError("trainer.data: no document is left to train on; lower trainer.data.holdout or add text")
        if self.spec.evaluate and not self.spec.data.module and not any(source.holdout for source in sources):
            raise UserError(
                f"trainer.data.holdout: {share} of the documents holds out none; raise it, or add documents"
            )
        digest = hashlib.sha256(f"{self.hash} {end}".encode())
        for source in sources:
            digest.update(f"{source.name} {source.fingerprint}".encode())
        meta = Meta(tuple(sources), end, self.vocabulary, self.hash, digest.hexdigest())
        (self.building / "meta.json").write_text(json.dumps(asdict(meta)))
        self.building.rename(self.folder)

    # --- tokenizer ----------------------------------------------------------------------------------------------

    def _tokenizer(self) -> tuple[Tokenizer, int]:
        """The tokenizer, and the id of its end of text."""
        training = self.spec.tokenizer.train
        if training is None:
            assert self.spec.tokenizer.uri is not None
            tokenizer = load_tokenizer(self.spec.tokenizer.uri, self.s3)
            return tokenizer, end_of_text(tokenizer, load_config(self.spec.tokenizer.uri, self.s3))
        if training.kind != "unigram" or self.shared is None:
            tokenizer = train_tokenizer(self._training_texts(), training)
        else:
            tokenizer = self._agreed(self.shared)
        return tokenizer, end_of_text(tokenizer)

    def _agreed(self, shared: ObjectStore) -> Tokenizer:
        """The tokenizer that the first pod of the job trained."""
        # Not the folder's key: a job that goes on after an upgrade keeps the tokenizer that it began with.
        key = f"tokenizer-{_key(self.spec, self.files, _AGREED)}.json"
        assert self.spec.tokenizer.train is not None
        if not shared.list(key):
            trained = train_tokenizer(self._training_texts(), self.spec.tokenizer.train)
            try:
                shared.put(key, trained.to_str().encode(), only_if_absent=True)
            except PreconditionFailed:
                self.progress.say("another pod was sooner: taking its tokenizer")
        return Tokenizer.from_buffer(shared.get(key)[0])

    def _training_texts(self) -> Iterator[str]:
        """Text of the training documents: what is held out is not learned through the tokenizer's merges either."""
        found = False
        for name, files in self.files.trained.items():
            left = TRAINING_CHARACTERS // len(self.files.trained)
            for file in files:
                if format_of(file) == "tokens":
                    continue
                for document in documents(file):
                    if left > 0 and not document.held_out(self.spec.data.holdout):
                        found = True
                        left -= len(document.text)
                        self.progress.documents(f"tokenizer: {name}", 1)
                        yield document.text
                if left <= 0:
                    break
        if not found:
            raise UserError(
                "trainer.data: no document is left to train a tokenizer on; lower trainer.data.holdout or add text, or "
                "name the tokenizer of token shards in trainer.tokenizer.uri"
            )

    # --- sources ------------------------------------------------------------------------------------------------

    def _source(
        self, number: int, name: str, files: list[SourceFile], tokenizer: Tokenizer, share: float
    ) -> SourceMeta:
        formats = {format_of(file) for file in files}
        if "tokens" in formats and len(formats) > 1:
            raise UserError(
                f"trainer.data.sources: {name} mixes token shards with {', '.join(sorted(formats - {'tokens'}))}; make "
                "two sources of it"
            )
        if formats == {"tokens"}:
            source = use_shards(self.building, number, name, files, share, tokenizer=self.hash)
        else:
            source = self._tokenize(number, name, files, tokenizer, share)
        if self.spec.data.packing == "bestFit":
            for part in PARTS:
                path = self.building / f"{number}-{part}"
                lengths = LocalShard(Path(f"{path}.tokens.lengths"), 4).ids
                write_pieces(lengths, self.spec.data.sequence_length, Path(f"{path}.pieces"))
        return source

    def _tokenize(
        self, number: int, name: str, files: list[SourceFile], tokenizer: Tokenizer, share: float
    ) -> SourceMeta:
        width = width_for(self.vocabulary)
        with (
            ShardWriter(self.building / f"{number}-train.tokens", width, self.hash) as train,
            ShardWriter(self.building / f"{number}-holdout.tokens", width, self.hash) as holdout,
        ):
            for batch in batches_of(document for file in files for document in documents(file)):
                encoded = tokenizer.encode_batch_fast([each.text for each in batch], add_special_tokens=False)
                for document, encoding in zip(batch, encoded, strict=True):
                    (holdout if document.held_out(share) else train).add([*encoding.ids, self.end])
                self.progress.documents(name, len(batch), train.tokens + holdout.tokens)
        metas = [self._written(f"{number}-{part}.tokens") for part in PARTS]
        digest = hashlib.sha256("".join(meta.sha256 for meta in metas).encode()).hexdigest()
        return SourceMeta(name, metas[0].tokens, metas[1].tokens, width, digest)

    def _written(self, name: str) -> ShardMeta:
        return read_meta((self.building / f"{name}.json").read_bytes(), name)


def _key(spec: TrainerSpec, files: Iterable[SourceFile], version: int) -> str:
    """Names everything that goes in. Python's version counts since {stdlib} is its text."""
    data = spec.data
    digest = hashlib.sha256(f"{version} {sys.version}\n".encode())
    digest.update(spec.tokenizer.model_dump_json().encode())
    packing = f"{data.packing} {data.sequence_length}" if data.packing == "bestFit" else data.packing
    digest.update(f"{data.holdout} {packing} {data.module}\n".encode())
    for file in files:
        parts = (file.root.uri, file.source, file.path, file.size, file.format, file.field)
        digest.update("\0".join(map(str, parts)).encode() + b"\n")
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
