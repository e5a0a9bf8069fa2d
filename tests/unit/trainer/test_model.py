"""Every choice of the decoder against a plain formula. Whole models against `transformers`: test_huggingface.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
import transformers
from torch import Tensor

from lockstep_trainer.model.attention import Attention, Places
from lockstep_trainer.model.config import Activation, DecoderConfig
from lockstep_trainer.model.decoder import Block, Decoder, Part
from lockstep_trainer.model.feedforward import FeedForward
from lockstep_trainer.model.init import initial_weight
from lockstep_trainer.model.positions import SinusoidalPositions, alibi_slopes, attention_factor, frequencies

SMALL = DecoderConfig(dim=24, layers=2, heads=6, kv_heads=2, ffn_dim=32, vocab_size=40, rope_theta=100.0, max_length=64)
CPU, LENGTH = torch.device("cpu"), 13


@pytest.fixture(autouse=True)
def double() -> object:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def tokens(samples: int = 2) -> Tensor:
    return torch.randint(0, 40, (samples, LENGTH), generator=torch.Generator().manual_seed(1))


def randomised(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5)


# --- feed-forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("swiglu", lambda gate, up: gate / (1 + torch.exp(-gate)) * up),
        ("reglu", lambda gate, up: gate.clamp(min=0) * up),
        ("geglu", lambda gate, up: gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up),
        ("gelu", lambda _gate, up: up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))),
        ("relu", lambda _gate, up: up.clamp(min=0)),
    ],
)
def test_activations(activation: Activation, formula: object) -> None:
    assert callable(formula)
    ffn, x = FeedForward(replace(SMALL, activation=activation), 32), torch.randn(3, 24)
    gate = None if ffn.gate is None else x @ ffn.gate.weight.T
    torch.testing.assert_close(ffn(x), formula(gate, x @ ffn.up.weight.T) @ ffn.down.weight.T)
    assert (ffn.gate is None) == (activation in ("gelu", "relu"))


# --- attention -------------------------------------------------------------------------------------------------------


def plain_attention(layer: Attention, x: Tensor, seen: Tensor, added: Tensor) -> Tensor:
    """softmax(QKᵀ/√E + added)V over the pairs that are ``seen``, head by head. ``added`` (heads, T, T)."""
    width, group = layer.head_dim, layer.query.out_features // layer.key.out_features
    out = []
    for head in range(layer.query.out_features // width):
        rows = slice(head * width, (head + 1) * width)
        shared = slice(head // group * width, (head // group + 1) * width)

        def of(linear: torch.nn.Linear, part: slice) -> Tensor:
            y = x @ linear.weight[part].T
            return y if linear.bias is None else y + linear.bias[part]

        scores = of(layer.query, rows) @ of(layer.key, shared).transpose(-1, -2) / math.sqrt(width) + added[head]
        out.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ of(layer.value, shared))
    return torch.cat(out, -1) @ layer.output.weight.T


def distances() -> Tensor:
    at = torch.arange(LENGTH)
    return at[:, None] - at[None, :]


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_queries_windows_and_biases(heads: tuple[int, int], window: int, bias: bool) -> None:
    config = replace(SMALL, heads=heads[0], kv_heads=heads[1], window=window, attention_bias=bias)
    layer, x = Attention(config), torch.randn(2, LENGTH, 24)
    randomised(layer)
    distance = distances()
    seen = (distance >= 0) & (distance < (window or LENGTH))
    mask = Places().mask(torch.arange(LENGTH), None, window)
    assert (mask is None) == (window in (0, 100))  # the causal order alone leaves flash kernels free
    torch.testing.assert_close(layer(x, None, mask), plain_attention(layer, x, seen, torch.zeros(6, 1, 1)))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20])
def test_alibi_slopes_are_those_of_bloom(heads: int) -> None:
    mask = torch.ones(1, 2)
    theirs = transformers.models.bloom.modeling_bloom.build_alibi_tensor(mask, heads, torch.float64)  # slope × position
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs[:, 0, 1])


@pytest.mark.parametrize("window", [0, 4])
def test_alibi_lowers_scores_by_distance(window: int) -> None:
    layer, x = Attention(replace(SMALL, positions="alibi", window=window)), torch.randn(2, LENGTH, 24)
    distance = distances()
    seen = (distance >= 0) & (distance < (window or LENGTH))
    added = -torch.tensor(alibi_slopes(6))[:, None, None] * distance
    mask = Places().distances(torch.arange(LENGTH), None, window)
    torch.testing.assert_close(layer(x, None, mask), plain_attention(layer, x, seen, added))


def test_alibi_where_a_rank_has_some_of_the_heads() -> None:
    """Split as tensor parallelism does: the outputs of the parts add up to that of the whole."""
    config = replace(SMALL, positions="alibi")
    layer, x = Attention(config), torch.randn(2, LENGTH, 24)
    mask = Places().distances(torch.arange(LENGTH), None, 0)
    total = torch.zeros(2, LENGTH, 24)
    for rank in range(2):
        part = Attention(replace(config, heads=3, kv_heads=1, head_size=4))
        part._slopes = layer._slopes
        part.first_head = 3 * rank
        with torch.no_grad():
            for name in ("query", "key", "value"):
                getattr(part, name).weight.copy_(getattr(layer, name).weight.chunk(2)[rank])
            part.output.weight.copy_(layer.output.weight.chunk(2, dim=1)[rank])
        total += part(x, None, mask)
    torch.testing.assert_close(total, layer(x, None, mask))


def test_alibi_is_exact_for_far_tokens_in_bfloat16() -> None:
    layer = Attention(replace(SMALL, positions="alibi"))
    mask = Places().distances(torch.arange(2000), None, 0)
    bias = layer._bias(mask, 6, torch.bfloat16)[0, :, -1].double()
    expected = -torch.tensor(alibi_slopes(6))[:, None] * torch.arange(1999, -1, -1)
    torch.testing.assert_close(bias, expected, rtol=2**-8, atol=0)


# --- positions -------------------------------------------------------------------------------------------------------


def hugging_face_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    scaling = {
        "rope_type": config.rope_scaling,
        "rope_theta": config.rope_theta,
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.rope_original_length,
        "low_freq_factor": config.rope_low_frequency,
        "high_freq_factor": config.rope_high_frequency,
        "beta_fast": config.rope_beta_fast,
        "beta_slow": config.rope_beta_slow,
    }
    theirs = transformers.LlamaConfig(
        hidden_size=config.dim, num_attention_heads=config.heads, head_dim=config.head_dim, rope_parameters=scaling
    )
    found, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[config.rope_scaling](theirs, CPU)
    return found, factor


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, head_size=128, rope_theta=500_000.0, rope_factor=8.0, rope_original_length=8192),
        replace(SMALL, head_size=64, rope_theta=10_000.0, rope_factor=32.0, rope_original_length=4096),
        replace(SMALL, head_size=64, rope_theta=1e6, rope_factor=4.0, rope_original_length=32_768, rope_beta_fast=16.0),
        replace(SMALL, head_size=16, rope_theta=100.0, rope_factor=1.0, rope_original_length=64),
    ],
)
def test_scaled_frequencies_are_those_of_transformers(scaling: str, config: DecoderConfig) -> None:
    config = replace(config, rope_scaling=scaling)  # type: ignore[arg-type]
    expected, factor = hugging_face_frequencies(config)
    torch.testing.assert_close(frequencies(config, CPU), expected.double(), rtol=1e-5, atol=0)
    assert attention_factor(config) == pytest.approx(factor)


def test_sinusoidal_positions() -> None:
    found = SinusoidalPositions(SMALL)(torch.tensor([[0, 1, 700]]))
    for number, position in enumerate((0, 1, 700)):
        for pair in range(12):
            angle = position / 10_000 ** (2 * pair / 24)
            assert float(found[0, number, pair]) == pytest.approx(math.sin(angle), abs=1e-12)
            assert float(found[0, number, 12 + pair]) == pytest.approx(math.cos(angle), abs=1e-12)


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned", "sinusoidal"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_order_matters_and_documents_are_apart(positions: str, norm: str) -> None:
    config = replace(SMALL, positions=positions, norm=norm)  # type: ignore[arg-type]
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(10 * initial_weight(name, parameter.shape, config, 3, CPU))
    first, second = tokens().split(1)
    swapped = first[:, [1, 0, *range(2, LENGTH)]]
    assert not torch.allclose(model(first)[0, -1], model(swapped)[0, -1], rtol=1e-4)
    # Two documents in one sample give the logits of two samples.
    at = torch.cat([torch.arange(8), torch.arange(5)])[None]
    documents = torch.cat([torch.zeros(8), torch.ones(5)]).long()[None]
    packed = model(torch.cat([first[:, :8], second[:, :5]], 1), at, documents)
    torch.testing.assert_close(packed, torch.cat([model(first[:, :8]), model(second[:, :5])], 1))


# --- the whole -------------------------------------------------------------------------------------------------------


def test_layer_norm_learned_positions_and_gelu_are_gpt2() -> None:
    """GPT-2 without its biases on products, and with the exact GELU."""
    config = DecoderConfig(
        dim=24,
        layers=2,
        heads=4,
        kv_heads=4,
        ffn_dim=96,
        vocab_size=40,
        max_length=32,
        tie_embeddings=True,
        norm="layer",
        positions="learned",
        activation="gelu",
        attention_bias=True,
    )
    settings = transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=4, activation_function="gelu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs, ours = transformers.GPT2LMHeadModel(settings).double().eval(), Decoder(config)
    randomised(theirs)
    weight = theirs.state_dict()
    mine: dict[str, Tensor] = {
        "embedding.weight": weight["transformer.wte.weight"],
        "position.weight": weight["transformer.wpe.weight"],
    }
    norms = {"norm": "transformer.ln_f"}
    for layer in range(2):
        there, here = f"transformer.h.{layer}.", f"blocks.{layer}."
        norms |= {f"{here}attention_norm": f"{there}ln_1", f"{here}ffn_norm": f"{there}ln_2"}
        for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            weight[f"{there}{name}.bias"].zero_()
        for number, name in enumerate(("query", "key", "value")):
            mine[f"{here}attention.{name}.weight"] = weight[f"{there}attn.c_attn.weight"].chunk(3, 1)[number].T
            mine[f"{here}attention.{name}.bias"] = weight[f"{there}attn.c_attn.bias"].chunk(3)[number]
        mine[f"{here}attention.output.weight"] = weight[f"{there}attn.c_proj.weight"].T
        mine[f"{here}ffn.up.weight"] = weight[f"{there}mlp.c_fc.weight"].T
        mine[f"{here}ffn.down.weight"] = weight[f"{there}mlp.c_proj.weight"].T
    for name, source in norms.items():
        mine |= {f"{name}.weight": weight[f"{source}.weight"], f"{name}.bias": weight[f"{source}.bias"]}
    ours.load_state_dict(mine)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits)


def test_parts_in_a_row_are_the_whole() -> None:
    for positions in ("rope", "learned", "alibi"):
        config = replace(SMALL, positions=positions, tie_embeddings=True)  # type: ignore[arg-type]
        model = Decoder(config)
        state = model.state_dict()
        first, last = Decoder(config, Part((0,), True, False)), Decoder(config, Part((1,), False, True))
        for part in (first, last):
            part.load_state_dict({name: state[name] for name in part.state_dict()})
        torch.testing.assert_close(last(first(tokens())), model(tokens()))


def test_gradients_reach_every_parameter() -> None:
    config = replace(SMALL, norm="layer", positions="learned", attention_bias=True, qk_norm=True, tie_embeddings=True)
    model = Decoder(config)
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12]
    # What is added to all keys moves all scores of a query alike.
    assert silent == [f"blocks.{layer}.attention.key_norm.bias" for layer in range(2)]


def test_experts_take_the_place_of_the_feed_forward_part() -> None:
    config = replace(SMALL, experts=4, dense_layers=1)
    assert [type(Block(config, layer).ffn).__name__ for layer in range(2)] == ["FeedForward", "MoE"]


def test_fresh_experts_that_write_to_the_stream_are_smaller() -> None:
    config = replace(SMALL, layers=8)
    inside = initial_weight("blocks.0.ffn.experts.up", torch.Size((4, 64, 64)), config, 0, CPU)
    outside = initial_weight("blocks.0.ffn.experts.down", torch.Size((4, 64, 64)), config, 0, CPU)
    assert float(inside.std()) == pytest.approx(0.02, rel=0.05)
    assert float(outside.std()) == pytest.approx(0.005, rel=0.05)
