"""What is wrong with a manifest is said in a sentence that names the field and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lockstep_cli import manifest
from lockstep_cli.errors import ManifestError

GOOD: dict[str, Any] = {
    "apiVersion": "lockstep.dev/v1alpha1",
    "kind": "TrainingJob",
    "metadata": {"name": "small"},
    "spec": {
        "nodes": 2,
        "gpusPerNode": 2,
        "trainer": {
            "model": {"preset": "llama-debug"},
            "data": {"sources": [{"uri": "file:///data/*.txt"}], "sequenceLength": 64},
            "recipe": {"steps": 10, "globalBatchTokens": 1024},
        },
        "checkpoint": {"uri": "file:///checkpoints"},
    },
}


def problems(*overrides: str, **top: Any) -> list[str]:
    document = manifest.override({**GOOD, **top}, overrides)
    with pytest.raises(ManifestError) as caught:
        manifest.parse(document, "job.yaml")
    return caught.value.problems


def test_a_good_manifest_is_read(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    job = manifest.load(str(file), ["trainer.recipe.steps=50"])
    assert job.name == "small"
    assert job.spec.trainer is not None
    assert job.spec.trainer.recipe.steps == 50


def test_other_objects_in_the_file_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump_all([{"kind": "Secret"}, GOOD]))
    assert manifest.load(str(file)).name == "small"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainer.recipe.stepz=3", "spec.trainer.recipe.stepz: unknown field; did you mean steps?"),
        ("nodes=0", "spec.nodes: input should be greater than or equal to 1 (it is 0)"),
        ("command=[python, train.py]", "spec: set exactly one of trainer and command"),
        (
            "parallelism.replicate=3",
            "parallelism: replicate × tensor × pipeline × context = 3 does not divide the 4 GPUs",
        ),
        ("trainer.recipe.globalBatchTokens=1000", "choose a multiple"),
        ("checkpoint.uri=/somewhere", "spec.checkpoint.uri: "),
        ("checkpoint=null", "checkpoint.uri is required with trainer"),
        (
            "checkpoint.uri=/data/ck",
            "spec.checkpoint.uri: '/data/ck' is not of its form; write it like s3://bucket/prefix or file:///folder",
        ),
        ("checkpoint.resumeFrom=ck", "checkpoint.resumeFrom: 'ck' is not of its form; write it like s3://bucket/pre"),
        ("checkpoint.memory.limit=64GB", "spec.checkpoint.memory.limit: '64GB' is not of its form; write it like 64Gi"),
        ("checkpoint.s3.uploadBandwidth=fast", "uploadBandwidth: 'fast' is not of its form; write it like 500Mi or 2G"),
        ("trainer.data.sources.0.name=my text", "spec.trainer.data.sources.0.name: 'my text' is not of its form; wri"),
        ("trainer.callbacks=[{module: comet}]", "callbacks.0.module: 'comet' is not of its form; write it like tensor"),
        ("trainer.recipe.precision=fp16", "spec.trainer.recipe.precision: 'fp16' is unknown; choose one of bf16, fp32"),
        ("trainer.export={uri: s3://b, format: gguf}", "export.format: 'gguf' is unknown; write huggingface"),
    ],
)
def test_a_mistake_in_the_spec(override: str, sentence: str) -> None:
    assert any(sentence in problem for problem in problems(override)), problems(override)


def test_mistakes_around_the_spec() -> None:
    assert problems(apiVersion="lockstep.dev/v2") == [
        "apiVersion: 'lockstep.dev/v2' is not served; set it to lockstep.dev/v1alpha1"
    ]
    assert "metadata.name: 'Big_Job'" in problems(metadata={"name": "Big_Job"})[0]
    assert "did you mean spec?" in problems(specs={})[0]


def test_all_mistakes_are_said() -> None:
    found = problems("nodes=0", "trainer.model.presset=x", "trainer.recipe.optimizer.lr=-1")
    assert len(found) == 3


def test_missing_fields_are_named() -> None:
    assert "spec.nodes: missing; it has no default, so set it" in problems(spec={"gpusPerNode": 1})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not YAML: line 1, column 5"),
        ("at: 2026-13-01", "is not YAML: month must be in 1..12"),
        ("spec: {}\nspec: {}\nkind: TrainingJob", "the key 'spec' stands twice"),
        ("kind: Deployment", "kind: no TrainingJob in it (found: Deployment)"),
        ("", "found: nothing"),
    ],
)
def test_a_file_that_is_no_manifest(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ManifestError) as caught:
        manifest.load(str(file))
    assert sentence in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ManifestError, match="no such file"):
        manifest.load("/nowhere/job.yaml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("nodes", "is not path=value"),
        ("nodes.deep=1", "is below a plain value"),
        ("trainer.data.sources.4.uri=x", "is no place in a list of 1"),
        (
            "trainer.generate.prompt=def f(x): return {x: 1}",
            "--set: trainer.generate.prompt: 'def f(x): return {x: 1}' is not YAML: line 1, column 20: mapping values",
        ),
        ("trainer.generate.prompt=a: b: c", "inside those of the shell: --set 'trainer.generate.prompt=\"…\"'"),
        ("trainer.data.sources.0.exclude=[**/test/**]", "--set 'trainer.data.sources.0.exclude=[\"…\"]'"),
        ("trainer.generate.prompt=2026-13-01", "'2026-13-01' is not YAML: month must be in 1..12"),
    ],
)
def test_a_wrong_override(override: str, sentence: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(sentence)):
        manifest.override(GOOD, [override])


def test_what_is_quoted_is_a_text() -> None:
    exclude, prompt = "trainer.data.sources.0.exclude", "trainer.generate.prompt"
    changed = manifest.override(GOOD, [f'{exclude}=["**/test/**"]', f'{prompt}="def f(x): return {{x: 1}}"'])
    assert changed["spec"]["trainer"]["data"]["sources"][0]["exclude"] == ["**/test/**"]
    assert changed["spec"]["trainer"]["generate"]["prompt"] == "def f(x): return {x: 1}"


def test_an_override_reaches_into_lists_and_leaves_the_original_alone() -> None:
    changed = manifest.override(GOOD, ["spec.trainer.data.sources.0.uri=file:///other"])
    assert changed["spec"]["trainer"]["data"]["sources"][0]["uri"] == "file:///other"
    assert GOOD["spec"]["trainer"]["data"]["sources"][0]["uri"] == "file:///data/*.txt"
