"""FLOPs by formula are those that torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.flops import (
    forward_flops_per_token,
    matrix_weights,
    mean_keys,
    model_flops_utilization,
    peak_flops,
    training_flops_per_token,
)
from lockstep_trainer.model.presets import PRESETS
from lockstep_trainer.model.weights import parameter_count

SMALL = DecoderConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab_size=96, tie_embeddings=True)
LENGTH = 24


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, tie_embeddings=False, qk_norm=True, head_size=16),
        replace(SMALL, activation="relu", positions="learned", norm="layer", attention_bias=True),
    ],
)
def test_formula_and_counter_agree(config: DecoderConfig) -> None:
    model = Decoder(config)
    tokens = torch.randint(0, 96, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    # Attention as plain products: the counter then sees scores and values, the whole square of them.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    by_formula = training_flops_per_token(config, LENGTH, full_square=True) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(by_formula, rel=1e-12)


def test_a_mixture_counts_the_chosen_experts_only() -> None:
    mixture = replace(SMALL, experts=8, experts_per_token=2, expert_dim=24, shared_expert_dim=16, dense_layers=1)
    sparse = 3 * 32 * (2 * 24 + 16) + 8 * 32  # two experts, the shared one, the router
    assert matrix_weights(mixture) - matrix_weights(SMALL) == sparse - 3 * 32 * 48
    # All but norms and the embedding's look-up, which a tied head needs as a matrix.
    norms = (2 * 2 + 1) * 32
    assert matrix_weights(mixture) == parameter_count(mixture, active=True) - norms


@pytest.mark.parametrize("window", [0, 1, 5, 24, 100])
def test_mean_keys_counts_the_pairs_of_the_mask(window: int) -> None:
    seen = sum(min(position + 1, window or LENGTH) for position in range(LENGTH))
    assert mean_keys(LENGTH, window) == pytest.approx(seen / LENGTH)


def test_a_published_figure() -> None:
    """Llama 3.1 405B over 15.6 × 10¹² tokens at 8,192: 3.8 × 10²⁵ FLOPs (Grattafiori et al. 2024)."""
    assert training_flops_per_token(PRESETS["llama3-405b"].config, 8192) * 15.6e12 == pytest.approx(3.8e25, rel=0.05)
    assert forward_flops_per_token(SMALL, LENGTH) * 3 == training_flops_per_token(SMALL, LENGTH)


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 80GB HBM3", "float8", 1978.8),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA H20", "bf16", 148.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "fp32", 67.0),
        ("NVIDIA H100 PCIe", "fp32", 51.0),
        ("NVIDIA A10G", "fp32", None),
        ("NVIDIA A100-SXM4-80GB", "float8", None),
        ("NVIDIA A10G", "bf16", 70.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("Tesla T4", "bf16", None),
        ("NVIDIA A40", "bf16", 149.7),
        ("NVIDIA RTX A4000", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
    ],
)
def test_peaks_are_found_by_the_name_that_torch_gives(name: str, precision: str, teraflops: float | None) -> None:
    peak = peak_flops(name, precision)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_utilization_is_a_share() -> None:
    assert model_flops_utilization(50e9, 10_000, 1e15) == pytest.approx(0.5)
