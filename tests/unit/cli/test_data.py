"""``lockstep data prepare``: shards that a job trains on give what its text would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lockstep_api.v1alpha1 import S3Spec, TrainerSpec
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


def test_what_can_not_be_prepared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--to", f"file://{tmp_path}/x", "--train", "bytes"]
    assert main(["data", "prepare", f"file://{tmp_path}/*.txt", *rest]) == 1
    assert "matches no file" in capsys.readouterr().err
    assert main(["data", "prepare", "/text/*.txt", *rest]) == 1
    assert "uri: String should match pattern" in capsys.readouterr().err
