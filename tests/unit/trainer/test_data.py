"""Files, tokenizer and tokens: the same in every pod, made once in each, and nothing held out is trained on."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from forked import start_all, wait_all
from lockstep_api.v1alpha1 import EvaluateSpec, S3Spec, TokenizerTraining, TrainerSpec
from lockstep_trainer.data.prepare import Corpus, prepare
from lockstep_trainer.data.sources import find_files, glob_regex
from lockstep_trainer.data.tokenizer import end_of_text, load_config, load_tokenizer, train_tokenizer
from lockstep_trainer.errors import UserError
from lockstep_trainer.storage import open_store

STDLIB = "file://{stdlib}/json/**/*.py"


def spec(uri: str = STDLIB, *, data: dict[str, Any] | None = None, source: dict[str, Any] | None = None) -> TrainerSpec:
    return TrainerSpec.model_validate(
        {
            "model": {"preset": "llama-debug"},
            "tokenizer": {"train": {"vocabSize": 400}},
            "data": {"sources": [{"uri": uri, **(source or {})}], "sequenceLength": 16, **(data or {})},
            "recipe": {"steps": 1, "globalBatchTokens": 64},
        }
    )


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("**/*.py", ["a.py", "x/y/a.py"], ["a.pyc", "x/a.txt"]),
        ("*.py", ["a.py"], ["x/a.py"]),
        ("test/**", ["test/a", "test/x/y"], ["tests/a", "x/test/a"]),
        ("**/tests/**", ["tests/a", "x/tests/y/a"], ["x/mytests/a"]),
        ("a?[0-9].txt", ["ab3.txt"], ["a3.txt", "abc.txt"]),
        ("a+b(1).txt", ["a+b(1).txt"], ["aab1.txt"]),
    ],
)
def test_wildcards_mean_what_the_shell_means(pattern: str, yes: list[str], no: list[str]) -> None:
    regex = glob_regex(pattern)
    assert [path for path in yes if not regex.fullmatch(path)] == []
    assert [path for path in no if regex.fullmatch(path)] == []


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return f"file://{folder}"


def test_files_are_sorted_excluded_and_bounded(tmp_path: Path) -> None:
    root = write(tmp_path, {"b.txt": "22", "a/x.txt": "4444", "a/skip/y.txt": "1", "c.txt": "333", "d.md": "1"})
    sources = spec(f"{root}/**/*.txt", source={"exclude": ["**/skip/**"], "maxBytes": 7}).data.sources
    assert [file.path for file in find_files(sources, S3Spec())] == ["a/x.txt", "b.txt"]


def test_the_standard_library_is_found_without_installed_packages() -> None:
    paths = [file.path for file in find_files(spec("file://{stdlib}/**/*.py").data.sources, S3Spec())]
    assert "json/decoder.py" in paths
    assert not [path for path in paths if "site-packages" in path or "__pycache__" in path]


@pytest.mark.parametrize("uri", ["file:///no/such/folder/*.txt", "file://{stdlib}/*.nothing"])
def test_a_source_without_files_is_refused_with_its_uri(uri: str) -> None:
    with pytest.raises(UserError, match=r"sources\[0\]\.uri: .* matches no file"):
        find_files(spec(uri).data.sources, S3Spec())


def stream(corpus: Corpus, part: int = 0, source: int = 0) -> NDArray[np.int64]:
    """All tokens of a source: what is trained on, or what is held out."""
    streams = corpus.sources[source].streams
    assert streams
    return streams[part].read(np.array([0]), np.array([streams[part].tokens]))


def test_tokens_decode_to_the_text_with_an_end_behind_each_file(tmp_path: Path) -> None:
    root = write(tmp_path / "text", {"a.txt": "Grüße, 世界\n", "b.txt": "def f(x):\n    return x\n"})
    corpus = prepare(spec(f"{root}/*.txt"), S3Spec(), tmp_path / "data")
    tokenizer = corpus.tokenizer()
    assert corpus.end == tokenizer.token_to_id("<|endoftext|>")
    ids = stream(corpus)
    assert np.flatnonzero(ids == corpus.end).tolist()[-1] == len(ids) - 1
    assert (ids == corpus.end).sum() == 2
    assert tokenizer.decode(ids.tolist()) == "Grüße, 世界\ndef f(x):\n    return x\n"


def test_held_out_files_are_not_trained_on(tmp_path: Path) -> None:
    """Neither their tokens nor, through the tokenizer's merges, their words."""
    root = write(tmp_path / "text", {f"{n}.txt": f"file{n:03d}x " * 50 for n in range(40)})
    corpus = prepare(spec(f"{root}/*.txt", data={"holdout": 0.2}), S3Spec(), tmp_path / "data")
    parts = [corpus.tokenizer().decode(stream(corpus, part).tolist()) for part in (0, 1)]
    text = dict(zip(("train", "holdout"), parts, strict=True))
    names = {part: {n for n in range(40) if f"file{n:03d}x" in words} for part, words in text.items()}
    assert names["train"] | names["holdout"] == set(range(40))
    assert not names["train"] & names["holdout"]
    assert 2 <= len(names["holdout"]) <= 16


def prepare_into(data_dir: Path, threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["PYTHONHASHSEED"] = str(threads)
    corpus = prepare(spec(data={"holdout": 0.2}), S3Spec(), data_dir)
    (data_dir / f"seen-{os.getpid()}").write_text(corpus.meta.fingerprint)


def fingerprints(*data_dirs: Path) -> set[str]:
    return {path.read_text() for data_dir in data_dirs for path in data_dir.glob("seen-*")}


def test_pods_with_different_threads_make_the_same_tokens(tmp_path: Path) -> None:
    pods = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    workers = [partial(prepare_into, pod, threads) for pod, threads in zip(pods, (1, 2, 4), strict=True)]
    assert wait_all(start_all(workers)) == [0, 0, 0]
    assert len(fingerprints(*pods)) == 1


def test_the_workers_of_a_pod_prepare_once(tmp_path: Path) -> None:
    assert wait_all(start_all([partial(prepare_into, tmp_path, 1)] * 3)) == [0, 0, 0]
    assert len(fingerprints(tmp_path)) == 1
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    before = (folder / "meta.json").stat().st_mtime_ns
    prepare(spec(data={"holdout": 0.2}), S3Spec(), tmp_path)
    assert (folder / "meta.json").stat().st_mtime_ns == before


def test_a_worker_that_died_while_it_prepared_leaves_no_trap(tmp_path: Path) -> None:
    corpus = prepare(spec(), S3Spec(), tmp_path / "first")
    half = tmp_path / "second" / f".{corpus.folder.name}"
    half.mkdir(parents=True)
    (half / "0-train.tokens").write_bytes(b"half")
    assert prepare(spec(), S3Spec(), tmp_path / "second").meta == corpus.meta


def test_too_little_text_to_hold_out_is_said(tmp_path: Path) -> None:
    root = write(tmp_path / "text", {"a.txt": "text"})
    wanting = spec(f"{root}/*.txt", data={"holdout": 0.01}).model_copy(update={"evaluate": EvaluateSpec()})
    with pytest.raises(UserError, match=r"trainer\.data\.holdout: .* raise it"):
        prepare(wanting, S3Spec(), tmp_path / "data")


def test_held_out_text_without_a_whole_sample_is_refused_before_training(tmp_path: Path) -> None:
    root = write(tmp_path / "text", {"train.txt": "text " * 40, "held.txt": "x" * 32})  # and an end of text
    wanted = spec(f"{root}/train.txt").model_dump(by_alias=True, exclude_none=True)
    wanted |= {"tokenizer": {"train": {"kind": "bytes"}}}
    wanted |= {"evaluate": {"sources": [{"name": "held", "uri": f"{root}/held.txt"}]}}
    wanted["data"]["sequenceLength"] = 32
    corpus = prepare(TrainerSpec.model_validate(wanted), S3Spec(), tmp_path / "data")
    assert [source.name for source in corpus.evaluated] == ["held"]
    wanted["data"]["sequenceLength"] = 33
    with pytest.raises(UserError, match=r"trainer\.data\.holdout: no source has 34 held-out tokens, .* add text"):
        prepare(TrainerSpec.model_validate(wanted), S3Spec(), tmp_path / "data")


def test_a_tokenizer_can_be_brought(tmp_path: Path) -> None:
    made: Corpus = prepare(spec(), S3Spec(), tmp_path / "first")
    brought = spec().model_dump(by_alias=True, exclude_none=True)
    brought["tokenizer"] = {"uri": f"file://{made.folder}/tokenizer.json"}
    corpus = prepare(TrainerSpec.model_validate(brought), S3Spec(), tmp_path / "second")
    assert np.array_equal(stream(corpus), stream(made))
    brought["tokenizer"] = {"uri": f"file://{tmp_path}/none.json"}
    with pytest.raises(UserError, match=r"trainer\.tokenizer\.uri"):
        prepare(TrainerSpec.model_validate(brought), S3Spec(), tmp_path / "third")


@pytest.mark.parametrize("uri", ["{}", "{}/", "{}/tokenizer.json"])
def test_a_tokenizer_is_a_folder_or_its_file(tmp_path: Path, uri: str) -> None:
    train_tokenizer(["a b"], TokenizerTraining(kind="bytes")).save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(f"file://{uri.format(tmp_path)}", S3Spec())
    assert found.get_vocab_size() == 257


@pytest.mark.parametrize("uri", ["nosuch", "nosuch.json", "/no/such", "http://host/tokenizer.json"])
def test_what_is_no_uri_of_a_tokenizer_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"^--tokenizer: .* names no store: write s3://bucket/prefix, or file:///fold"):
        load_tokenizer(uri, S3Spec(), "--tokenizer")


def test_a_tokenizer_may_have_any_file_name(tmp_path: Path) -> None:
    train_tokenizer(["a b"], TokenizerTraining(kind="bytes")).save(str(tmp_path / "100 % mine.json"))
    assert load_tokenizer((tmp_path / "100 % mine.json").as_uri(), S3Spec()).get_vocab_size() == 257


def test_the_end_of_text_is_what_the_tokenizers_config_calls_it(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a"], TokenizerTraining(kind="bytes"))
    tokenizer.add_special_tokens(["<stop>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert end_of_text(tokenizer) == 256
    assert end_of_text(tokenizer, load_config(f"file://{tmp_path}", S3Spec())) == 257


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_every_kind_of_tokenizer_writes_any_text(kind: str) -> None:
    texts = ["the theory of these other things " * 5, "def f(x):\n    return x\n"]
    tokenizer = train_tokenizer(texts, TokenizerTraining(kind=kind, vocab_size=290))
    strange = "Grüße,\t世界 \x00 🙂\r\n"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
    assert end_of_text(tokenizer) not in tokenizer.encode(strange).ids
    if kind == "bytes":
        assert tokenizer.encode(strange).ids == list(strange.encode())
    else:
        assert len(tokenizer.encode(texts[0]).ids) < len(texts[0]) * 0.8


def test_pods_agree_on_a_unigram_tokenizer_through_their_store(tmp_path: Path) -> None:
    """Its training gives other bits each time; what the first pod wrote counts, also for a pod that comes later."""
    wanted = spec().model_dump(by_alias=True, exclude_none=True)
    wanted["tokenizer"] = {"train": {"kind": "unigram", "vocabSize": 300}}
    shared = open_store(f"file://{tmp_path}/store")
    pods = [
        prepare(TrainerSpec.model_validate(wanted), S3Spec(), tmp_path / pod, shared).meta.fingerprint
        for pod in ("one", "two")
    ]
    assert pods[0] == pods[1]


def test_an_upgrade_keeps_the_tokenizer_that_pods_agreed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training would give another, and the job would be refused its own data."""
    wanted = spec().model_dump(by_alias=True, exclude_none=True)
    wanted["tokenizer"] = {"train": {"kind": "unigram", "vocabSize": 300}}
    shared = open_store(f"file://{tmp_path}/store")
    made = []
    for version in (2, 3, 4):
        monkeypatch.setattr("lockstep_trainer.data.prepare._FORMAT", version)
        made.append(prepare(TrainerSpec.model_validate(wanted), S3Spec(), tmp_path / "data", shared).meta.fingerprint)
    assert len(list((tmp_path / "data").glob("*/meta.json"))) == 3
    assert len(shared.list()) == 1
    assert len(set(made)) == 1
