"""`lockstep validate`, `run` and `submit` know what the trainer would refuse, and takes what it would take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lockstep_cli import manifest, runnable
from lockstep_cli.__main__ import main
from unit.cli.test_manifest import GOOD

REPOSITORY = Path(__file__).parents[3]


def problems(*overrides: str) -> list[str]:
    return runnable.problems(manifest.parse(manifest.override(GOOD, overrides), "job.yaml"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainer.model.preset=lama", "spec.trainer.model.preset: 'lama' is unknown; choose one of llama-debug, "),
        ("trainer.model.overrides={layrs: 3}", "spec.trainer.model.overrides.layrs: there is no such field; choose fr"),
        ("trainer.model.overrides={layers: many}", "spec.trainer.model.overrides.layers: 'many' is no count; write a"),
        ("trainer.model.overrides={heads: 3, kv_heads: 3}", "spec.trainer.model: dim 128 over 3 heads is no whole wi"),
        ("parallelism.expert=2", "spec.parallelism: expert is 2 and the model has no experts; leave it out"),
        ("trainer.recipe.microBatchSize=3", "spec.trainer.recipe: microBatchSize 3 does not divide the 4 samples of "),
        ("checkpoint.uri=file://ck", "spec.checkpoint.uri: 'file://ck' is no path from the root on; write file:///fo"),
        ("checkpoint.uri=s3:///ck", "spec.checkpoint.uri: 's3:///ck' names no bucket; write s3://bucket/prefix"),
        ("trainer.data.sources.0.uri=file://x/*.txt", "spec.trainer.data.sources.0.uri: 'file://x/*.txt' is no path"),
        ("trainer.tokenizer={uri: file://tok}", "spec.trainer.tokenizer.uri: 'file://tok' is no path from the root on"),
        ("trainer.export={uri: file://out}", "spec.trainer.export.uri: 'file://out' is no path from the root on"),
        (
            "checkpoint.resumeFrom=file:///ck/step-1-e1-g1",
            "spec.checkpoint.resumeFrom: file:///ck/step-1-e1-g1 is no m",
        ),
    ],
)
def test_what_can_not_run_is_said(override: str, sentence: str) -> None:
    (found,) = problems(override)
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("checkpoint.uri='file:///ck?q'", "checkpoint.uri: 'file:///ck?q'"),
        (
            "checkpoint.resumeFrom='s3://b/a#1/step-1-e1-g1/manifest.json'",
            "checkpoint.resumeFrom: 's3://b/a#1/step-1-e",
        ),
        ("trainer.export={uri: 's3://models/mine#2'}", "trainer.export.uri: 's3://models/mine#2'"),
        (
            "trainer.model={preset: llama-debug, initFrom: 's3://models/mine?v=2'}",
            "trainer.model.initFrom: 's3://models/mine?v=2'",
        ),
        ("trainer.tokenizer={uri: 's3://models/mine?/tokenizer.json'}", "trainer.tokenizer.uri: 's3://models/mine?'"),
        ("trainer.tokenizer={uri: 's3://models/mine?'}", "trainer.tokenizer.uri: 's3://models/mine?'"),
        ("trainer.data.sources.0.uri='file:///a#1/*.txt'", "trainer.data.sources.0.uri: 'file:///a#1'"),
        ("trainer.data.sources.0.uri='s3://te?t/*.txt'", "trainer.data.sources.0.uri: 's3://te?t'"),
        ("trainer.evaluate={every: 5, sources: [{name: b, uri: 'file:///#/b'}]}", "trainer.evaluate.sources.0.uri: 'f"),
    ],
)
def test_a_path_that_its_uri_would_cut_short_is_said(override: str, field: str) -> None:
    (found,) = problems(override)
    assert found.startswith(f"spec.{field}")
    assert found.endswith(": what follows ? or # is no part of a URI's path; write %3F and %23, or another name")


def test_what_could_not_be_exported_is_said() -> None:
    (found,) = problems("trainer.export.uri=s3://bucket/model", "trainer.model.overrides={norm: layer}")
    assert found.startswith("spec.trainer.export: Hugging Face's transformers has no architecture with norm layer")


def test_each_mistake_has_a_sentence() -> None:
    assert (
        len(problems("trainer.model.preset=lama", "trainer.model.overrides={a: 1, b: 2}", "checkpoint.uri=s3:///")) == 4
    )


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("trainer.data.sources.0.uri=file://{stdlib}/**/*.py",),
        # A wildcard, and names that are compared as they are.
        ("trainer.data.sources.0.uri='file:///text/part-?/#1.txt'",),
        ("trainer.tokenizer={uri: 'file:///text/tokenizer#1.json'}",),
        ("checkpoint.resumeFrom=s3://bucket/a/b/uid/step-100-e1-g1/manifest.json",),
        ("trainer.model={module: 'mine:model', overrides: {depth: 3}}", "parallelism.expert=2"),
        # Of weights that are brought, only their config.json says how many positions they have learned.
        (
            "trainer.model={preset: llama-debug, overrides: {positions: learned}, initFrom: 's3://bucket/model'}",
            "trainer.data.sequenceLength=16384",
            "trainer.recipe.globalBatchTokens=65536",
        ),
        ("trainer=null", "command=[train]"),
    ],
)
def test_what_can_run_is_taken(overrides: tuple[str, ...]) -> None:
    assert problems(*overrides) == []


@pytest.mark.parametrize("file", ["quickstart.yaml", "demo.yaml", "custom/job.yaml"])
def test_the_examples_can_run(file: str) -> None:
    assert runnable.problems(manifest.load(str(REPOSITORY / "examples" / file))) == []


@pytest.mark.parametrize("command", ["validate", "run", "submit"])
def test_it_is_said_before_anything_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    file = str(REPOSITORY / "examples" / "quickstart.yaml")
    assert main([command, file, "--set", "trainer.model.preset=lama"]) == 2
    assert f"lockstep: {file}: spec.trainer.model.preset: 'lama' is unknown" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_it_takes_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lockstep_cli import manifest, runnable\n"
        "job = manifest.load(sys.argv[1], ['parallelism.expert=2', 'checkpoint.resumeFrom=s3://b/x'])\n"
        "print(len(runnable.problems(job)))"
    )
    file = str(REPOSITORY / "examples" / "quickstart.yaml")
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
