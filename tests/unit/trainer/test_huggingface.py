"""The decoder gives the logits of `transformers`, from our weights and from theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lockstep_api.v1alpha1 import ModelSpec, TokenizerTraining
from lockstep_trainer.data.tokenizer import train_tokenizer
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.export import export_model
from lockstep_trainer.model.huggingface import family, from_json, to_json
from lockstep_trainer.model.presets import PRESETS, model_config
from lockstep_trainer.model.pretrained import load_weights, read_config
from lockstep_trainer.storage import open_store

LLAMA = DecoderConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab_size=96, rope_theta=100.0, max_length=64)
QWEN3 = replace(LLAMA, qk_norm=True, head_size=16, norm_eps=1e-6, tie_embeddings=True)
MIXTRAL = replace(LLAMA, experts=4, experts_per_token=2, balance_rate=0.0)
LONG = {"rope_factor": 4.0, "rope_original_length": 16}
CASES = {
    "llama": LLAMA,
    "llama, multi-query, llama3 scaling": replace(LLAMA, kv_heads=1, rope_scaling="llama3", **LONG),
    "llama, yarn": replace(LLAMA, rope_scaling="yarn", rope_beta_fast=4.0, **LONG),
    "mistral, window": replace(LLAMA, window=7),
    "mistral, window longer than the sequence": replace(LLAMA, window=50),
    "qwen2": replace(LLAMA, attention_bias=True),
    "qwen2, window": replace(LLAMA, attention_bias=True, window=5),
    "qwen3": QWEN3,
    "qwen3, window": replace(QWEN3, window=5),
    "mixtral": MIXTRAL,
    "mixtral, window": replace(MIXTRAL, window=7),
    "qwen3-moe": replace(QWEN3, experts=4, expert_dim=24, balance_rate=0.0, dense_layers=1),
    "qwen3-moe, not normalised": replace(QWEN3, experts=4, expert_dim=24, balance_rate=0.0, normalize_routing=False),
    "glm4-moe": replace(
        LLAMA, experts=4, expert_dim=24, routing="sigmoid", shared_expert_dim=48, dense_layers=1, attention_bias=True
    ),
    "glm4-moe, qk-norm": replace(QWEN3, experts=4, expert_dim=24, routing="sigmoid", shared_expert_dim=24),
}
TOKENS = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(3))


def decoder(config: DecoderConfig) -> Decoder:
    """Weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.3 if tensor.dim() < 2 else 0.2)
    return model


def state(model: Decoder) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **{n: b for n, b in model.state_dict().items() if "router_bias" in n}}


def theirs(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize("name", CASES)
def test_an_export_has_the_same_logits_in_transformers(tmp_path: Path, name: str) -> None:
    config, store = CASES[name], open_store(f"file://{tmp_path}")
    model = decoder(config)
    export_model(state(model), config, store, tokenizer=None, dtype=torch.float32, file_bytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    with torch.no_grad():
        torch.testing.assert_close(theirs(tmp_path), model(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_transformers_has_the_same_logits_here(tmp_path: Path, name: str) -> None:
    config, store = CASES[name], open_store(f"file://{tmp_path}")
    torch.manual_seed(1)
    settings = transformers.AutoConfig.for_model(**_for_model(config))
    other = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for key, tensor in other.state_dict().items():
            tensor.normal_(1.0 if "norm" in key else 0.0, 0.3 if tensor.dim() < 2 else 0.2)
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    found = read_config(store)
    assert replace(found, balance_rate=config.balance_rate, max_length=config.max_length) == _comparable(config)
    model = Decoder(found)
    load_weights(state(model), found, store)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(tmp_path), rtol=1e-4, atol=1e-4)


def _for_model(config: DecoderConfig) -> dict[str, Any]:
    return {**to_json(config, dtype="float32", end_id=None), "max_position_embeddings": config.max_length}


def _comparable(config: DecoderConfig) -> DecoderConfig:
    """Without the fields that mean nothing in this configuration."""
    if config.experts and config.qk_norm is False and config.routing == "softmax":
        return replace(config, expert_dim=0)
    return config


def test_a_small_export_is_one_file_and_brings_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one two three", "two three four"], TokenizerTraining(vocab_size=260))
    config = replace(QWEN3, vocab_size=320)
    export_model(state(decoder(config)), config, open_store(f"file://{tmp_path}"), tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("two four").input_ids == tokenizer.encode("two four").ids
    assert loaded.decode(loaded("two four").input_ids) == "two four"
    assert loaded.eos_token_id == json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert not (tmp_path / "model.safetensors.index.json").exists()
    text = loaded.decode(model.generate(**loaded("one", return_tensors="pt"), max_new_tokens=3, do_sample=False)[0])
    assert text.startswith("one")


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if "debug" not in name])
def test_presets_survive_config_json(preset: str) -> None:
    config = PRESETS[preset].config
    if config.head_size * config.heads == config.dim:
        config = replace(config, head_size=0)
    if config.experts:
        config = replace(config, balance_rate=0.0)
    assert from_json(to_json(config, dtype="bfloat16", end_id=0), "config.json") == config


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"norm": "layer"}, "norm layer; set norm: rms"),
        ({"activation": "relu"}, "set activation: swiglu"),
        ({"positions": "alibi"}, "set positions: rope"),
        ({"qk_norm": True, "attention_bias": True}, "set attention_bias: false"),
        ({"experts": 4}, "set balance_rate: 0"),
        ({"experts": 4, "balance_rate": 0.0, "shared_expert_dim": 8}, "set shared_expert_dim: 0"),
        ({"experts": 4, "balance_rate": 0.0, "dense_layers": 1}, "set dense_layers: 0"),
        ({"experts": 4, "balance_rate": 0.0, "normalize_routing": False}, "set normalize_routing: true"),
        ({"experts": 4, "routing": "sigmoid"}, "shared_expert_dim to a multiple of the experts' 48"),
        ({"experts": 4, "routing": "sigmoid", "shared_expert_dim": 48, "window": 3}, "set window: 0"),
    ],
)
def test_what_transformers_does_not_know_is_refused(changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        family(replace(LLAMA, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures .* can't be trained; choose a model with one of Llama"),
        ({"hidden_act": "gelu"}, "hidden_act gelu can't be trained; only silu can"),
        ({"attention_bias": True}, "attention_bias True can't be trained"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE .* not plain, llama3 or yarn"),
        ({"partial_rotary_factor": 0.5}, "RoPE .* over whole heads"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* can't be trained"),
    ],
)
def test_what_can_not_be_trained_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"here: {message}"):
        from_json({**to_json(LLAMA, dtype="float32", end_id=0), **changes}, "here")


def test_a_job_takes_vocabulary_and_positions_from_its_checkpoint() -> None:
    checkpoint = replace(
        PRESETS["llama-debug"].config, vocab_size=101, rope_theta=7.0, rope_scaling="yarn", rope_factor=2.0
    )
    config = model_config(ModelSpec(preset="llama-debug", overrides={"rope_factor": 8.0}), 100, checkpoint=checkpoint)
    assert config == replace(checkpoint, rope_factor=8.0)
    with pytest.raises(UserError, match=r"embedding has 101 rows and the tokenizer 102 tokens"):
        model_config(ModelSpec(preset="llama-debug"), 102, checkpoint=checkpoint)
    with pytest.raises(UserError, match=r"is not a qwen-debug: it has head_dim 32 instead of 64, qk_norm False"):
        model_config(ModelSpec(preset="qwen-debug"), 100, checkpoint=checkpoint)


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export_model(state(decoder(LLAMA)), LLAMA, open_store(f"file://{tmp_path}"), tokenizer=None, dtype=torch.float32)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(LLAMA, layers=3), "model.layers.2.input_layernorm.weight is missing"),
        (replace(LLAMA, layers=1), "9 tensors that the architecture has no place for: model.layers.1"),
        (replace(LLAMA, ffn_dim=40), r"mlp.gate_proj.weight has the shape \(48, 32\) instead of \(40, 32\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(exported: Path, config: DecoderConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_weights(state(Decoder(config)), config, open_store(f"file://{exported}"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", lambda data: data[:-4], "ends too early"),
        ("model.safetensors", lambda data: data[:100], "its header can't be read"),
        ("model.safetensors", lambda data: b"<html>not found</html>", "is no safetensors file"),
        ("model.safetensors", lambda data: data.replace(b"F32", b"I32"), "has type I32; only F64, F32"),
        ("config.json", None, "config.json is missing; name a folder in Hugging Face's format"),
        ("config.json", lambda data: data[:40], "config.json can't be read"),
    ],
)
def test_damaged_files_are_refused(exported: Path, file: str, content: Any, message: str) -> None:
    path = exported / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        load_weights(state(Decoder(LLAMA)), LLAMA, open_store(f"file://{exported}"))
