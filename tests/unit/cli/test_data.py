"""``lockstep data prepare``: shards that a job trains on give what its text would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lockstep_api.v1alpha1 import S3Spec, TrainerSpec
from lockstep_cli import store
from lockstep_cli.__main__ import main
from lockstep_trainer.data.prepare import prepare

TEXTS = [f"text {number} " * (number % 5 + 1) for number in range(40)]


def spec(uri: str, tokenizer: str) -> TrainerSpec:
    return TrainerSpec.model_validate(
        {
            "model": {"preset": "llama-debug"},
            "tokenizer": {"uri": tokenizer},
            "data": {"sources": [{"uri": uri}], "sequenceLength": 16},
            "recipe": {"steps": 1, "globalBatchTokens": 64},
        }
    )


def test_shards_give_what_the_text_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    uri, to = f"file://{tmp_path}/x.jsonl", f"file://{tmp_path}/shards"
    command = ["data", "prepare", uri, "--to", to, "--train", "bpe", "--vocab-size", "270", "--field", "body"]
    assert main([*command, "--shard-tokens", "100", "--output", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["documents"] == len(TEXTS)
    assert answer["shards"] > 3
    shards = prepare(spec(answer["uri"], f"{to}/tokenizer.json"), S3Spec(), tmp_path / "data")
    (tmp_path / "y.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    text = prepare(spec(f"file://{tmp_path}/y.jsonl", f"{to}/tokenizer.json"), S3Spec(), tmp_path / "data")
    ids = np.arange(len(text.sources[0].train))
    assert shards.sizes() == text.sizes() == {"data": len(ids)}
    found, expected = (each.sources[0].train.windows(ids).tokens for each in (shards, text))
    assert np.array_equal(found, expected)
    assert main(command) == 1
    assert "has token shards already; choose an empty folder" in capsys.readouterr().err


def test_plain_paths_are_taken_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "my [texts] 100%"
    (here / "in" / "deep").mkdir(parents=True)
    (here / "in" / "deep" / "x.txt").write_text("a b c")
    monkeypatch.chdir(here)
    assert main(["data", "prepare", "in/**/*.txt", "--to", "made", "--train", "bytes", "--output", "json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["uri"] == f"{(here / 'made').as_uri()}/*.tokens"
    for place in ("made", f"{here}/made/tokenizer.json"):
        to = tmp_path / f"again-{len(place)}"
        assert main(["data", "prepare", "in/deep/x.txt", "--to", str(to), "--tokenizer", place]) == 0
        assert (to / "tokenizer.json").read_bytes() == (here / "made" / "tokenizer.json").read_bytes()
        assert f"source with uri {to.as_uri()}/*.tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "pattern"),
    [
        ("s3://b/*.txt", "s3://b/*.txt"),
        ("/x.txt", "file:///x.txt"),
        ("/a b/c*/d?.txt", "file:///a%20b/c*/d?.txt"),
        ("/a/**/*.txt", "file:///a/**/*.txt"),
    ],
)
def test_a_path_keeps_its_wildcards(place: str, pattern: str) -> None:
    assert store.as_pattern(place) == pattern


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("file://{}/*.txt", "--train", "bytes"), "URI: file://{}/*.txt matches no file"),
        (("{}/*.txt", "--train", "bytes"), "URI: file://{}/*.txt matches no file"),
        (("http://host/x", "--train", "bytes"), "URI: 'http://host/x' is not of its form; write it like s3://bucket/p"),
        (
            ("{}/in", "--train", "bpe", "--vocab-size", "3"),
            "--vocab-size: input should be greater than or equal to 260",
        ),
        (("{}/in", "--train", "bytes", "--field", ""), "--field: string should have at least 1 character"),
        (("{}/in", "--train", "bytes", "--shard-tokens", "0"), "--shard-tokens 0: write a number from 1"),
        (("{}/in", "--train", "bytes", "--to", "http://host"), "--to: 'http://host' names no store: write s3://bucket"),
        (("{}/in", "--tokenizer", "{}/nosuch"), "--tokenizer: get {}/nosuch/tokenizer.json: there is no such object"),
        (("{}/in", "--tokenizer", "http://nosuch"), "--tokenizer: 'http://nosuch' names no store: write s3://bucket"),
    ],
)
def test_what_can_not_be_prepared_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "in").write_text("a b c")
    given = [word.format(tmp_path) for word in words]
    assert main(["data", "prepare", "--to", f"file://{tmp_path}/x", *given]) == 1
    assert f"lockstep: {sentence.format(tmp_path)}" in capsys.readouterr().err
