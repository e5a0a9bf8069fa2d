"""Presets are the published models, and every weight is known without building one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from lockstep_api.v1alpha1 import ModelSpec
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder, Part
from lockstep_trainer.model.huggingface import family
from lockstep_trainer.model.presets import PRESETS, check, described, model_config
from lockstep_trainer.model.weights import layer_weights, parameter_count, weights

SMALL = PRESETS["llama-debug"].config
VARIANTS = {
    **{name: preset.config for name, preset in PRESETS.items()},
    "layer norm, biases, learned": replace(
        SMALL, norm="layer", attention_bias=True, positions="learned", qk_norm=True, activation="gelu"
    ),
    "sinusoidal, untied": replace(SMALL, positions="sinusoidal", tie_embeddings=False, activation="reglu"),
    "shared experts": replace(SMALL, experts=4, expert_dim=40, shared_expert_dim=80, dense_layers=1),
    "experts without gates": replace(SMALL, experts=4, activation="relu"),
}


def module_weights(config: DecoderConfig, part: Part | None = None) -> list[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        module = Decoder(config, part)
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_by_formula_are_those_of_the_module(name: str) -> None:
    config = VARIANTS[name]
    assert [(weight.name, weight.shape) for weight in weights(config)] == module_weights(config)


@pytest.mark.parametrize(
    "part",
    [Part((0, 1), first=True, last=False), Part((2,), first=False, last=False), Part((3,), first=False, last=True)],
)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_a_part_are_those_of_the_module(part: Part, tied: bool) -> None:
    config = replace(SMALL, tie_embeddings=tied, positions="learned")
    found = weights(config, part.layers, first=part.first, last=part.last)
    assert [(weight.name, weight.shape) for weight in found] == module_weights(config, part)
    assert sum(w.count for w in layer_weights(config, part.layers[0])) * len(part.layers) == sum(
        w.count for w in found if w.name.startswith("blocks.")
    )


@pytest.mark.parametrize(
    ("preset", "billions", "active"),
    [
        ("llama3-1b", 1.24, None),
        ("llama3-3b", 3.21, None),
        ("llama3-8b", 8.03, None),
        ("llama3-70b", 70.55, None),
        ("llama3-405b", 405.85, None),
        ("qwen3-0.6b", 0.60, None),
        ("qwen3-1.7b", 1.72, None),
        ("qwen3-4b", 4.02, None),
        ("qwen3-8b", 8.19, None),
        ("qwen3-14b", 14.77, None),
        ("qwen3-32b", 32.76, None),
        ("mixtral-8x7b", 46.70, 12.88),
        ("qwen3-30b-a3b", 30.53, 3.35),
        ("qwen3-235b-a22b", 235.09, 22.19),
    ],
)
def test_presets_have_the_published_sizes(preset: str, billions: float, active: float | None) -> None:
    """Parameters, and those that a token meets, as the model cards state them."""
    config = PRESETS[preset].config
    assert parameter_count(config) / 1e9 == pytest.approx(billions, abs=0.005)
    assert parameter_count(config, active=True) / 1e9 == pytest.approx(active or billions, abs=0.005)


def test_every_preset_can_be_exported() -> None:
    kinds = {name: family(replace(preset.config, balance_rate=0.0)).model_type for name, preset in PRESETS.items()}
    for name, kind in kinds.items():
        expected = {"llama": "llama", "qwen": "qwen3", "mixtral": "mixtral", "moe": "qwen3_moe"}
        moe = "-a3b" in name or "-a22b" in name
        assert kind == ("qwen3_moe" if moe else expected[name.split("-")[0].rstrip("3")])
        assert kind in transformers.CONFIG_MAPPING


def test_a_job_rounds_the_vocabulary_up_and_changes_what_it_names() -> None:
    spec = ModelSpec(preset="llama3-1b", overrides={"layers": 2, "window": 0, "norm_eps": 1, "norm": "layer"})
    config = model_config(spec, tokens=300)
    assert config == replace(PRESETS["llama3-1b"].config, vocab_size=320, layers=2, norm_eps=1.0, norm="layer")
    assert isinstance(config.norm_eps, float)
    assert described("llama3-1b", {"layers": 2}).vocab_size == 128_256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "overrides.norm: 'batch' is unknown; choose one of rms, layer"),
        ({"norm": 1}, "overrides.norm: 1 is unknown"),
        ({"layers": True}, "overrides.layers: True is no count; write a whole number from 1"),
        ({"window": -1}, "write a whole number from 0"),
        ({"rope_theta": 0}, "write a number above 0"),
        ({"balance_rate": -1e-3}, "write a number from 0"),
        ({"norm_eps": float("nan")}, "is no size"),
        ({"rope_theta": float("inf")}, "is no size"),
        ({"tie_embeddings": "yes"}, "write true or false"),
        ({"vocab_size": 3}, "there is no such field"),
    ],
)
def test_overrides_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        described("llama-debug", changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 130}, "dim 130 over 4 heads is no whole width per head"),
        ({"head_size": 7}, "a head of 7 can't be turned in pairs"),
        ({"kv_heads": 3}, "kv_heads 3 does not divide heads 4; choose a divisor"),
        ({"positions": "alibi", "rope_scaling": "yarn"}, "rope_scaling yarn needs positions: rope"),
        ({"rope_scaling": "yarn", "rope_factor": 0.5}, "rope_factor 0.5 would shorten the context"),
        ({"rope_scaling": "llama3", "rope_low_frequency": 4.0}, "rope_low_frequency 4.0 is not below"),
        ({"rope_scaling": "yarn", "rope_beta_slow": 32.0}, "rope_beta_slow 32.0 is not below"),
        ({"experts": 4, "experts_per_token": 5}, "experts_per_token 5 is more than experts 4"),
        ({"shared_expert_dim": 8}, "shared_expert_dim 8 needs experts"),
        ({"dim": 33, "heads": 3, "kv_heads": 3, "positions": "sinusoidal"}, "dim 33 has no halves"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"trainer.model: {message}"):
        check(replace(SMALL, **changes))
