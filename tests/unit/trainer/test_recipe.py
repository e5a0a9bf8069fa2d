"""Clipping, presets and the bigram model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lockstep_api.v1alpha1 import ModelSpec, OptimizerSpec
from lockstep_trainer.bigram import bigram_loss
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.presets import model_config
from lockstep_trainer.optim.build import build_optimizer


def test_norms_and_embeddings_do_not_decay() -> None:
    model = Decoder(model_config(ModelSpec(preset="llama-debug"), tokens=300))
    decayed, plain = build_optimizer(model.named_parameters(), OptimizerSpec(weight_decay=0.5)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert {names[p].split(".")[-2] for p in plain["params"]} == {"embedding", "attention_norm", "ffn_norm", "norm"}
    assert len(decayed["params"]) == 4 * 7


def test_presets_have_the_published_sizes() -> None:
    """Parameters with a vocabulary of 128,256, as the model cards state them, in billions."""
    for preset, billions in (("llama3-1b", 1.24), ("llama3-3b", 3.21), ("llama3-8b", 8.03), ("llama3-70b", 70.55)):
        with torch.device("meta"):
            model = Decoder(model_config(ModelSpec(preset=preset), tokens=128_256))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"preset": "llama4"}, "choose one of llama-debug, qwen-debug"),
        ({"preset": "llama-debug", "overrides": {"layer": 6}}, "overrides.layer: there is no such field; choose"),
        ({"preset": "llama-debug", "overrides": {"layers": 1.5}}, "1.5 is no count"),
        ({"preset": "llama-debug", "overrides": {"qk_norm": 1}}, "write true or false"),
        ({"preset": "llama-debug", "overrides": {"dim": 130}}, "multiple of 2 × heads"),
        ({"preset": "llama-debug", "overrides": {"kv_heads": 3}}, "kv_heads 3 does not divide heads 4"),
        ({"preset": "llama-debug", "overrides": {"vocab_size": 3}}, "there is no such field"),
    ],
)
def test_a_wrong_model_is_refused_with_the_remedy(spec: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_config(ModelSpec.model_validate(spec), tokens=300)


def test_the_model_is_causal() -> None:
    torch.manual_seed(0)
    model = Decoder(model_config(ModelSpec(preset="llama-debug", overrides={"qk_norm": True}), tokens=300))
    tokens = torch.randint(0, 300, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 300
    first, second = model(tokens), model(changed)
    assert torch.allclose(first[0, :8], second[0, :8], atol=1e-6)
    assert not torch.allclose(first[0, 8], second[0, 8], atol=1e-3)


# --- bigram --------------------------------------------------------------------------------------------------------


def test_bigram_knows_what_always_follows() -> None:
    cycle = np.tile(np.arange(5), 400)
    assert bigram_loss(cycle, cycle[:-1], cycle[1:], 5) == pytest.approx(0.0, abs=1e-3)


def test_bigram_of_independent_tokens_is_their_entropy() -> None:
    random = np.random.default_rng(0)
    share = np.array([0.5, 0.25, 0.125, 0.125])
    tokens = random.choice(4, 200_000, p=share)
    entropy = -(share * np.log(share)).sum()
    assert bigram_loss(tokens[:100_000], tokens[100_000:-1], tokens[100_001:], 4) == pytest.approx(entropy, abs=0.01)


def test_bigram_is_tuned_no_worse_than_any_fixed_mixture() -> None:
    """Against a direct implementation with a grid of weights: EM per class must reach at least the best of them."""
    random = np.random.default_rng(1)
    text = np.cumsum(random.integers(0, 3, 3000)) % 11
    train, test = text[:2000], text[2000:]
    pairs = {(a, b): 0 for a in range(11) for b in range(11)}
    for a, b in zip(train[:-1].tolist(), train[1:].tolist(), strict=True):
        pairs[a, b] += 1
    context = [sum(pairs[a, b] for b in range(11)) for a in range(11)]
    single = np.bincount(train, minlength=11) / len(train)

    def fixed(l2: float, l1: float) -> float:
        loss = 0.0
        for a, b in zip(test[:-1].tolist(), test[1:].tolist(), strict=True):
            loss -= math.log(l2 * pairs[a, b] / max(context[a], 1) + l1 * single[b] + (1 - l2 - l1) / 11)
        return loss / (len(test) - 1)

    best = min(fixed(l2, l1) for l2 in (0.5, 0.8, 0.9, 0.97) for l1 in (0.01, 0.02))
    assert bigram_loss(train, test[:-1], test[1:], 11) <= best + 1e-4


def test_bigram_survives_contexts_that_it_never_saw() -> None:
    loss = bigram_loss(np.array([0, 1, 0, 1]), np.array([7, 0]), np.array([9, 1]), 10)
    assert math.isfinite(loss)
