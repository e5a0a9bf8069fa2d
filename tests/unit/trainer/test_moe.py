"""The mixture layer: routing, products by expert, and what counts for balance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

from lockstep_trainer.model import grouped
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.moe import MoE


def small(**changes: Any) -> DecoderConfig:
    sizes: dict[str, Any] = {
        "dim": 16, "layers": 2, "heads": 2, "kv_heads": 2, "ffn_dim": 32, "vocab_size": 32,
        "experts": 6, "experts_per_token": 2, "expert_dim": 24,
    }  # fmt: skip
    return DecoderConfig(**{**sizes, **changes})


def layer(config: DecoderConfig, dtype: torch.dtype = torch.float64) -> MoE:
    torch.manual_seed(1)
    moe = MoE(config).to(dtype)
    with torch.no_grad():
        for weight in moe.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3)
    return moe


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def gradients(moe: MoE, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Of an arbitrary smooth loss: of every parameter by name, and of the input."""
    moe.zero_grad()
    x.grad = None
    (forward or moe)(x).sin().sum().backward()
    found = {name: weight.grad for name, weight in moe.named_parameters()} | {"x": x.grad}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def by_definition(moe: MoE, config: DecoderConfig, x: Tensor) -> Tensor:
    """Each token by itself, as the papers write it, from the layer's weights."""
    out = []
    for token in x.flatten(0, 1):
        logits = moe.router.weight @ token
        scores = logits.softmax(0) if config.routing == "softmax" else logits.sigmoid()
        wanted = scores if moe.router_bias is None else scores + moe.router_bias
        best = wanted.argsort(descending=True)[: config.experts_per_token]
        weights = scores[best] / scores[best].sum() if config.normalize_routing else scores[best]
        y = token.new_zeros(token.shape)
        for weight, number in zip(weights, best, strict=True):
            up = moe.experts.up[number] @ token
            inside = F.gelu(up) if moe.experts.gate is None else F.silu(moe.experts.gate[number] @ token) * up
            y = y + weight * (moe.experts.down[number] @ inside)
        if moe.shared is not None:
            y = y + moe.shared(token)
        out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize_routing": False},
        {"routing": "sigmoid", "shared_expert_dim": 20},
        {"activation": "gelu", "experts_per_token": 1},
        {"experts_per_token": 6},
        {"balance_rate": 0.0},
    ],
    ids=["softmax", "unnormalised", "sigmoid-shared", "no-gate-top-1", "all", "unbalanced"],
)
def test_output_and_all_gradients_are_those_of_the_definition(changes: dict[str, Any]) -> None:
    config = small(**changes)
    moe, x = layer(config), tokens()
    if moe.router_bias is not None:
        moe.router_bias.copy_(torch.linspace(0.2, -0.2, 6))
    torch.testing.assert_close(moe(x), by_definition(moe, config, x), rtol=1e-12, atol=1e-12)
    expected = gradients(moe, x, lambda x: by_definition(moe, config, x))
    found = gradients(moe, x)
    assert found.keys() == expected.keys() == {"x", *dict(moe.named_parameters())}
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-11, atol=1e-12)


def test_bias_changes_the_choice_and_not_the_weight() -> None:
    moe, x = layer(small(routing="sigmoid", normalize_routing=False)), tokens().detach().flatten(0, 1)
    assert moe.router_bias is not None
    moe.router_bias[4] = 10.0  # wanted by all tokens from now on
    weights, chosen = moe.route(x)
    assert (chosen[:, 0] == 4).all()
    torch.testing.assert_close(weights[:, 0], moe.router(x)[:, 4].sigmoid())


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    moe = layer(small())
    assert moe.router_bias is not None
    moe.router_bias[3] = -10.0
    found = gradients(moe, tokens())
    assert moe.expert_tokens[3] == 0
    assert not found["experts.up"][3].any()
    assert found["experts.up"][2].any()


def test_the_router_computes_in_float32_where_the_rest_is_bfloat16() -> None:
    moe, x = layer(small(), torch.bfloat16), tokens(torch.bfloat16)
    scores = moe.router(x.flatten(0, 1))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, x.flatten(0, 1).float() @ moe.router.weight.float().T)
    assert moe(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_grouped_mm_and_the_loop_agree(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float) -> None:
    moe, x = layer(small(), dtype), tokens(dtype)
    assert moe.router_bias is not None
    moe.router_bias[3] = -10.0  # an empty group among the others
    used = []
    kernel = F.grouped_mm

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        used.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "grouped_mm", watched)
    one_kernel = gradients(moe, x)
    assert len(used) == 3
    monkeypatch.setattr(grouped, "has_kernel", lambda rows, weight: False)
    loop = gradients(moe, x)
    assert len(used) == 3
    for name, grad in loop.items():
        torch.testing.assert_close(one_kernel[name], grad, rtol=tolerance, atol=tolerance)


def test_sizes_that_grouped_mm_refuses_go_through_the_loop() -> None:
    config = small(dim=6, expert_dim=10)
    rows, weight = torch.randn(5, 6), torch.randn(6, 10, 6)
    assert not grouped.has_kernel(rows, weight)
    assert not grouped.has_kernel(torch.randn(5, 16).double(), torch.randn(6, 8, 16).double())
    assert MoE(config)(torch.randn(2, 3, 6)).shape == (2, 3, 6)


def test_no_rows_at_all_give_zero_gradients() -> None:
    """A rank of expert parallel may get no token, and its gradients must take part in the reduction all the same."""
    experts = layer(small()).experts
    rows = torch.empty(0, 16, dtype=torch.float64, requires_grad=True)
    experts(rows, torch.zeros(6, dtype=torch.int64)).sum().backward()
    assert rows.grad is not None
    for weight in experts.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


def test_the_same_input_gives_the_same_bits() -> None:
    moe, x = layer(small(), torch.float32), tokens(torch.float32)
    first, second = gradients(moe, x), gradients(moe, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_token_of_a_step_counts_once() -> None:
    """Micro-batches add up; evaluation does not count, nor does the second forward of activation checkpointing."""
    moe, x = layer(small()), tokens()
    with torch.no_grad():
        moe(x)
    moe.eval()
    moe(x).sum().backward()
    moe.train()
    assert moe.expert_tokens.sum() == 0
    moe(x)  # a forward pass that nothing follows, like the one by which a pipeline learns its shapes
    assert moe.expert_tokens.sum() == 0
    gradients(moe, x)
    once = moe.expert_tokens.clone()
    assert once.sum() == 3 * 7 * 2
    expected = torch.bincount(moe.route(x.flatten(0, 1))[1].flatten(), minlength=6)
    assert torch.equal(once, expected)
    plain = gradients(moe, x)
    again = gradients(moe, x, lambda x: checkpoint(moe, x, use_reentrant=False))
    assert torch.equal(moe.expert_tokens, 3 * once)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_backward_pass_in_two_halves_counts_once_and_gives_the_same_gradients() -> None:
    """Zero-bubble schedules compute the gradients of inputs first and those of weights later."""
    moe, x = layer(small(shared_expert_dim=20)), tokens()
    expected = gradients(moe, x)
    once = moe.expert_tokens.clone()
    moe.zero_grad()
    moe.expert_tokens.zero_()
    x.grad = None
    y = moe(x) * 1.0  # a stage's output is not a view
    (grad,), groups = stage_backward_input([y], [y.detach().cos()], [x], moe.parameters())
    stage_backward_weight(moe.parameters(), groups)
    assert torch.equal(moe.expert_tokens, once)
    torch.testing.assert_close(grad, expected["x"], rtol=1e-12, atol=1e-13)
    for name, weight in moe.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-12, atol=1e-13)


def test_the_balance_bias_is_part_of_a_checkpoint_and_the_counts_are_not() -> None:
    assert "router_bias" in MoE(small()).state_dict()
    assert "expert_tokens" not in MoE(small()).state_dict()
    assert "router_bias" not in MoE(small(balance_rate=0.0)).state_dict()


def test_buffers_get_fresh_values_after_meta() -> None:
    with torch.device("meta"):
        moe = MoE(small())
    moe.to_empty(device="cpu")
    assert moe.router_bias is not None
    moe.router_bias.fill_(7.0)
    moe.expert_tokens.fill_(7)
    moe.reset_buffers()
    assert not moe.router_bias.any()
    assert not moe.expert_tokens.any()


def test_compiled_gradients_and_counts_are_those_of_eager() -> None:
    moe, x = layer(small(shared_expert_dim=20)), tokens()
    expected = gradients(moe, x)
    once = moe.expert_tokens.clone()
    moe.expert_tokens.zero_()
    forward = torch.compile(moe.forward, backend="aot_eager", dynamic=False)
    found = gradients(moe, x, lambda x: checkpoint(forward, x, use_reentrant=False))
    assert torch.equal(moe.expert_tokens, once)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-13)


class TestAgainstTransformers:
    """The same output as the blocks that people have checkpoints of."""

    def test_mixtral(self) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        theirs = MixtralSparseMoeBlock(  # type: ignore[no-untyped-call]
            MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2)
        ).double()
        _same_output(theirs, layer(small(balance_rate=0.0)))

    @pytest.mark.parametrize("normalised", [False, True])
    def test_qwen3(self, normalised: bool) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        theirs = Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(
                hidden_size=16,
                moe_intermediate_size=24,
                num_experts=6,
                num_experts_per_tok=2,
                norm_topk_prob=normalised,
            )
        ).double()
        _same_output(theirs, layer(small(balance_rate=0.0, normalize_routing=normalised)))


def _same_output(theirs: torch.nn.Module, moe: MoE) -> None:
    names = dict(theirs.named_parameters())
    assert moe.experts.gate is not None
    with torch.no_grad():
        names["gate.weight"].copy_(moe.router.weight)
        names["experts.gate_up_proj"].copy_(torch.cat((moe.experts.gate, moe.experts.up), 1))
        names["experts.down_proj"].copy_(moe.experts.down)
    x = tokens()
    out = theirs(x)
    out = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(moe(x), out, rtol=1e-6, atol=1e-6)  # theirs takes the softmax in float32
