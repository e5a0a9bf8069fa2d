"""``lockstep model``: what people and programs read of an architecture."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lockstep_cli.__main__ import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["model", *arguments]) == 0
    return capsys.readouterr().out


def test_the_list_has_sizes_and_active_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "list")
    assert "llama3-405b        405.85 B            Llama 3.1 405B" in text
    assert "qwen3-235b-a22b    235.09 B   22.19 B  Qwen3 235B-A22B" in text
    presets = json.loads(run(capsys, "list", "--output", "json"))["presets"]
    assert next(p["parameters"] for p in presets if p["name"] == "llama3-8b") == 8_030_261_248


def test_describe_shows_every_weight_and_the_memory_of_each_pipeline_rank(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "describe", "llama3-8b", "--gpus", "64", "--tensor", "8", "--pipeline", "2")
    assert "64 GPUs: shard 4 × tensor 8 × pipeline 2, 1F1B" in text
    assert "blocks.{0…31}.ffn.down.weight           4096 × 14336      32  1,879,048,192" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["0", "1"]


def test_json_has_a_line_for_each_weight_and_sums_that_agree(capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(
        run(capsys, "describe", "qwen3-30b-a3b", "--gpus", "8", "--expert", "8", "--set", "layers=3", "--output=json")
    )
    counts = [weight["count"] for weight in answer["weights"]]
    assert sum(counts) == answer["parameters"]
    assert answer["memory"][0]["parameters"] == 4 * sum(weight["perGpu"] for weight in answer["weights"])
    assert answer["memory"][0]["total"] == sum(v for k, v in answer["memory"][0].items() if k != "total")


def test_layers_with_and_without_experts_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "describe", "moe-debug", "--set", "dense_layers=1", "--set", "tie_embeddings=true")
    assert "blocks.0.ffn.gate.weight" in text
    assert "blocks.{1…3}.ffn.experts.gate" in text
    assert text.count("embedding.weight") == 1
    assert "head.weight" not in text
    assert "blocks.2.ffn.experts.gate" in run(capsys, "describe", "moe-debug", "--all")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["describe", "llama4"], "choose one of llama-debug"),
        (["describe", "llama-debug", "--set", "layers=0"], "write a whole number from 1"),
        (["describe", "llama-debug", "--set", "layers"], "write FIELD=VALUE"),
        (["describe", "llama-debug", "--set", "norm=batch"], "choose one of rms, layer"),
        (["describe", "llama-debug", "--tensor", "3"], "tensor 3 does not divide the model's 4 heads"),
        (["describe", "llama-debug", "--tensor", "0"], "--tensor: Input should be greater than or equal to 1"),
        (["describe", "llama-debug", "--gpus", "0"], "--gpus 0: write a number from 1"),
        (["describe", "llama-debug", "--gpus", "3", "--tensor", "2"], "does not make 3 ranks"),
        (["describe", "llama-debug", "--sequence-length", "0"], "--sequence-length 0: write a number from 1"),
        (["describe", "llama-debug", "--global-batch-tokens", "9000"], "multiples of 8192 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert main(["model", *arguments]) == 1
    assert sentence in capsys.readouterr().err


def test_it_runs_without_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from lockstep_cli.__main__ import main; sys.exit(main(['model', 'describe', 'llama3-405b']))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (answer.returncode, "405,853,388,800" in answer.stdout) == (0, True), answer.stderr


def test_a_value_that_is_no_yaml_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "describe", "llama-debug", "--set", "layers=[2"]) == 2
    assert "--set: layers: '[2' is not YAML: line 1, column 3" in capsys.readouterr().err
