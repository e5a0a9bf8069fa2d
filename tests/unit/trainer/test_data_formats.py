"""Every format gives the documents that are in its files, and what can't be read is named by file and row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet  # type: ignore[import-untyped]

from lockstep_api.v1alpha1 import S3Spec, TokenizerTraining, TrainerSpec
from lockstep_trainer.data import corpus as corpora
from lockstep_trainer.data import sources
from lockstep_trainer.data.documents import documents
from lockstep_trainer.data.prepare import Corpus, prepare
from lockstep_trainer.data.tokenizer import tokenizer_hash, train_tokenizer
from lockstep_trainer.data.tokens import RemoteShard, ShardWriter
from lockstep_trainer.errors import StoreError, UserError
from lockstep_trainer.storage.folder import FolderStore

TEXTS = [f"text {number}: Grüße, 世界 " + "word " * (number % 7) for number in range(60)]
Write = Callable[[Path], None]


def rows(field: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(TEXTS)).encode()


def write_parquet(path: Path, field: str = "text") -> None:
    parquet.write_table(pyarrow.table({"id": range(60), field: TEXTS}), path, row_group_size=16)


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


WRITERS: dict[str, Write] = {
    "x.jsonl": lambda path: path.write_bytes(rows()) and None,
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(rows())) and None,
    "x.jsonl.zst": lambda path: path.write_bytes(zstd(rows())) and None,
    "x.ndjson.gz": lambda path: path.write_bytes(gzip.compress(rows())) and None,
    "x.parquet": write_parquet,
    # Some tools give a file nothing but the ending.
    ".jsonl": lambda path: path.write_bytes(rows()) and None,
    ".jsonl.gz": lambda path: path.write_bytes(gzip.compress(rows())) and None,
    ".parquet": write_parquet,
}


def spec(
    uri: str, *, tokenizer: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **source: Any
) -> TrainerSpec:
    return TrainerSpec.model_validate(
        {
            "model": {"preset": "llama-debug"},
            "tokenizer": tokenizer or {"train": {"kind": "bytes"}},
            "data": {"sources": [{"uri": uri, **source}], "sequenceLength": 16, **(data or {})},
            "recipe": {"steps": 1, "globalBatchTokens": 64},
        }
    )


def texts_of(uri: str, **source: Any) -> list[str]:
    files = sources.find_files(spec(uri, **source).data.sources, S3Spec())
    return [document.text for file in files for document in documents(file)]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_documents(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert texts_of(f"file://{tmp_path}/*") == TEXTS


@pytest.mark.parametrize("name", ["x.txt.gz", "x.json.gz", "x.gz", "x.txt.zst"])
def test_a_compressed_text_is_what_was_compressed(tmp_path: Path, name: str) -> None:
    text = "\n".join(TEXTS * 500)
    (tmp_path / name).write_bytes((zstd if name.endswith(".zst") else gzip.compress)(text.encode()))
    assert texts_of(f"file://{tmp_path}/*") == [text]


def test_what_an_earlier_version_made_of_compressed_text_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the bytes as they lie for text; a local run keeps its tokens."""
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode() * 9))
    wanted = spec(f"file://{tmp_path}/*.gz")
    with monkeypatch.context() as earlier:
        earlier.setattr("lockstep_trainer.data.prepare._FORMAT", 2)
        earlier.setattr("lockstep_trainer.data.documents._compression", lambda _: None)
        assert decoded(prepare(wanted, S3Spec(), tmp_path / "data"), 0) != [TEXTS[0] * 9]
    assert decoded(prepare(wanted, S3Spec(), tmp_path / "data"), 0) == [TEXTS[0] * 9]


@pytest.mark.parametrize(
    "name", ["x.jsonl.bz2", "x.txt.xz", "x.lz4", "x.zip", "x.7z", "x.tar", "x.tgz", "x.tar.gz", "x.parquet.gz"]
)
def test_what_is_packed_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_bytes(b"packed")
    says = rf"trainer\.data\.sources\[0\]\.uri: file://.*/{name} is packed; unpack it, or leave it out with exclude"
    with pytest.raises(UserError, match=says):
        texts_of(f"file://{tmp_path}/*")
    assert texts_of(f"file://{tmp_path}/*", exclude=["x.*"]) == ["text"]


@pytest.mark.parametrize(
    ("name", "kind"), [("OpenSubtitles.br-fr.br", "auto"), ("notes.sz", "auto"), ("Makefile.Z", "text")]
)
def test_a_text_is_read_whatever_its_ending_may_mean(tmp_path: Path, name: str, kind: str) -> None:
    """Files of corpora are named by their language, and .br is Breton."""
    (tmp_path / name).write_text("Demat d'an holl")
    assert texts_of(f"file://{tmp_path}/*", format=kind) == ["Demat d'an holl"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
@pytest.mark.parametrize(("ending", "kind"), [("gz", "gzip"), ("zst", "zstd")])
def test_a_compressed_file_that_is_damaged_is_named(tmp_path: Path, name: str, ending: str, kind: str) -> None:
    packed = (gzip.compress if ending == "gz" else zstd)(rows())
    begun = packed[:40] + bytes(20) + packed[60:]  # behind the header
    for damaged in (packed[:-20], b"text", begun):
        (tmp_path / f"{name}.{ending}").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}\.{ending} is no whole {kind} file: "):
            texts_of(f"file://{tmp_path}/*")


def test_the_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rows("body"))
    write_parquet(tmp_path / "b.parquet", "body")
    assert texts_of(f"file://{tmp_path}/*", field="body") == TEXTS * 2


def test_rows_without_text_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": ""}\n{"text": "x"}\n')
    assert texts_of(f"file://{tmp_path}/*") == ["x"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n{"body": "b"}\n', r"row 2 of file://.*/a\.jsonl has no text \(it has body\)"),
        (b'{"text": "a"}\n{"text": \n', r"row 2 of file://.*/a\.jsonl is no JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"row 2 of file://.*/a\.jsonl is no JSON: .*utf-8"),
        (b"[1, 2]\n", r"row 1 of file://.*/a\.jsonl has no text \(it is no object\)"),
        (b'{"text": 3}\n', r"row 1 of file://.*/a\.jsonl: text is a int and no text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=says):
        texts_of(f"file://{tmp_path}/*")


def test_files_that_are_not_what_they_are_called_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=r"a\.parquet is no Parquet file"):
        texts_of(f"file://{tmp_path}/*.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows())[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is no whole gzip file"):
        texts_of(f"file://{tmp_path}/*.gz")
    write_parquet(tmp_path / "b.parquet", "body")
    with pytest.raises(UserError, match=r"b\.parquet has no text \(it has id, body\)"):
        texts_of(f"file://{tmp_path}/b.parquet")


def decoded(corpus: Corpus, part: int, source: int = 0) -> list[str]:
    streams = corpus.sources[source].streams
    assert streams
    ids = streams[part].read(np.array([0]), np.array([streams[part].tokens]))
    assert len(ids) == 0 or ids[-1] == corpus.end
    borders = np.flatnonzero(ids == corpus.end)
    return [corpus.tokenizer().decode(piece[piece != corpus.end].tolist()) for piece in np.split(ids, borders + 1)[:-1]]


def test_rows_are_held_out_one_by_one(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet")
    corpus = prepare(spec(f"file://{tmp_path}/*.parquet", data={"holdout": 0.2}), S3Spec(), tmp_path / "data")
    train, holdout = decoded(corpus, 0), decoded(corpus, 1)
    assert sorted([*train, *holdout]) == sorted(TEXTS)
    assert 4 <= len(holdout) <= 22


def test_sources_have_streams_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name * 40}) + "\n")
    wanted = spec("file:///x").model_dump(by_alias=True, exclude_none=True)
    wanted["data"]["sources"] = [{"name": n, "uri": f"file://{tmp_path}/{n}.jsonl"} for n in ("a", "b")]
    wanted["evaluate"] = {"sources": [{"name": "c", "uri": f"file://{tmp_path}/a.jsonl"}]}
    corpus = prepare(TrainerSpec.model_validate(wanted), S3Spec(), tmp_path / "data")
    assert [decoded(corpus, 0, n) for n in (0, 1)] == [["a" * 40], ["b" * 40]]
    assert corpus.sizes() == {"a": 2, "b": 2}
    assert [source.name for source in corpus.evaluated] == ["c"], "it is only evaluated, and nothing else is held out"
    assert corpus.training_tokens(20).tolist() == [*[97] * 10, *[98] * 10]
    other = TrainerSpec.model_validate({**wanted, "evaluate": None})
    apart = prepare(other, S3Spec(), tmp_path / "data")
    assert apart.fingerprint == corpus.fingerprint, "what is only evaluated does not change what is trained on"
    assert apart.meta.fingerprint != corpus.meta.fingerprint


class Bucket(FolderStore):
    """A folder that counts what is read of it, as a bucket far away."""

    read: dict[str, int] = {}  # noqa: RUF012 (one for all prefixes)
    fails = 0

    @property
    def uri(self) -> str:
        return super().uri.replace("file:///", "s3://")

    def get(self, key: str) -> tuple[bytes, str]:
        data, etag = super().get(key)
        self.read[key] = self.read.get(key, 0) + len(data)
        return data, etag

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        if type(self).fails:
            type(self).fails -= 1
            raise StoreError("no answer", temporary=True)
        self.read[key] = self.read.get(key, 0) + length
        return super().get_range(key, offset, length)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that s3://BUCKET/ stands for in sources."""
    root = tmp_path / "bucket"
    root.mkdir()

    def open_bucket(uri: str, _: S3Spec) -> Bucket:
        return Bucket(Path("/" + uri.removeprefix("s3://")))

    monkeypatch.setattr(sources, "open_store", open_bucket)
    monkeypatch.setattr(corpora, "open_store", open_bucket)
    monkeypatch.setattr(Bucket, "read", {})
    return root


def write_shards(folder: Path, tokenizer: str) -> None:
    for shard in range(3):
        with ShardWriter(folder / f"{shard}.tokens", 2, tokenizer) as writer:
            for text in TEXTS[shard * 20 : shard * 20 + 20]:
                writer.add([*text.encode(), 256])


def listing(root: Path, path: Path) -> str:
    return f"s3://{str(root).strip('/')}/{path}"


def bytes_hash() -> str:
    return tokenizer_hash(train_tokenizer([], TokenizerTraining(kind="bytes")))


@pytest.mark.parametrize("packing", ["concatenate", "bestFit"])
@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_token_shards_give_what_their_text_would(tmp_path: Path, packing: str, holdout: float) -> None:
    write_shards(tmp_path, bytes_hash())
    data = {"holdout": holdout, "packing": packing}
    corpus = prepare(spec(f"file://{tmp_path}/*.tokens", data=data), S3Spec(), tmp_path / "data")
    train, held = decoded(corpus, 0), decoded(corpus, 1)
    assert sorted([*train, *held]) == sorted(TEXTS)
    assert [text for text in TEXTS if text in train] == train
    assert bool(held) == bool(holdout)
    (tmp_path / "x.jsonl").write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in train))
    text = prepare(spec(f"file://{tmp_path}/x.jsonl", data={"packing": packing}), S3Spec(), tmp_path / "data")
    ids = np.arange(len(text.sources[0].train))
    mine, theirs = (each.sources[0].train.windows(ids).tokens for each in (corpus, text))
    assert np.array_equal(mine, theirs)


def test_remote_shards_are_read_by_ranges(tmp_path: Path, bucket: Path) -> None:
    write_shards(bucket, bytes_hash())
    corpus = prepare(spec(listing(bucket, Path("*.tokens"))), S3Spec(), tmp_path / "data")
    assert not [key for key in Bucket.read if key.endswith(".tokens")], "nothing is downloaded to prepare"
    windows = corpus.sources[0].train.windows(np.array([3, 70, 11]))
    assert sum(size for key, size in Bucket.read.items() if key.endswith(".tokens")) == 3 * 17 * 2
    stream = [token for text in TEXTS for token in [*text.encode(), 256]]
    assert windows.tokens.tolist() == [stream[n * 16 : n * 16 + 17] for n in (3, 70, 11)]
    corpus.close()


def test_an_outage_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, "0" * 64)
    paused: list[float] = []
    monkeypatch.setattr("lockstep_trainer.data.tokens.time.sleep", paused.append)
    monkeypatch.setattr(Bucket, "fails", 2)
    shard = RemoteShard(Bucket(tmp_path), "0.tokens", 2)
    assert shard.read(0, 4).tolist() == list(b"text")
    assert paused == [1.0, 2.0]
    monkeypatch.setattr(Bucket, "fails", 99)
    with pytest.raises(StoreError):
        shard.read(0, 4)


def test_shards_that_do_not_fit_are_named(tmp_path: Path) -> None:
    wanted = spec(f"file://{tmp_path}/*.tokens")
    write_shards(tmp_path, "0" * 64)
    with pytest.raises(UserError, match=r"0\.tokens was made with another tokenizer"):
        prepare(wanted, S3Spec(), tmp_path / "data")
    write_shards(tmp_path, bytes_hash())
    (tmp_path / "1.tokens").write_bytes((tmp_path / "1.tokens").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"1\.tokens has \d+ bytes and not the \d+"):
        prepare(wanted, S3Spec(), tmp_path / "data")
    (tmp_path / "0.tokens.json").unlink()
    with pytest.raises(UserError, match=r"0\.tokens has no \.json beside it"):
        prepare(wanted, S3Spec(), tmp_path / "data")
