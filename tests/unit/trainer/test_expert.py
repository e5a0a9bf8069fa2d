"""Expert parallel: a mixture of experts on several ranks computes what it does on one, to rounding in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from composed import CPU, Case, build, compare, global_batch, share, single
from forked import run_ranks
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder, Part
from lockstep_trainer.model.moe import MoE
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.expert import apply_experts, mixtures, update_balance
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes


def mixture(**changes: Any) -> DecoderConfig:
    sizes: dict[str, Any] = {
        "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 32, "vocab_size": 32,
        "experts": 8, "experts_per_token": 2, "expert_dim": 12, "shared_expert_dim": 20,
    }  # fmt: skip
    return DecoderConfig(**{**sizes, **changes})


def test_uneven_tokens_and_idle_experts() -> None:
    """Ranks with different numbers of tokens, one with none, and a rank whose experts nobody wants."""
    run_ranks(4, _uneven)


def _uneven(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    config = mixture(layers=1)
    tokens = [5, 0, 9, 1]
    rows = torch.randn(sum(tokens), config.dim, generator=torch.Generator().manual_seed(3))

    def fresh() -> Decoder:
        torch.manual_seed(1)
        part = Decoder(config, Part([0], first=False, last=False))
        (moe,) = mixtures([part])
        assert moe.router_bias is not None
        moe.router_bias[4:6] = -10.0  # those of rank 2
        moe.router_bias[0] = -10.0  # one of rank 0's
        return part

    (alone,) = mixtures([fresh()])
    whole = rows.clone().requires_grad_()
    expected = alone(whole)
    expected.sin().sum().backward()

    layout = Layout(shard=4, expert=4)
    part = fresh()
    apply_experts(part, layout, Meshes.build(layout, CPU))
    (moe,) = mixtures([part])
    begin = sum(tokens[:rank])
    own = slice(begin, begin + tokens[rank])
    mine = rows[own].clone().requires_grad_()
    found = moe(mine)
    found.sin().sum().backward()
    torch.testing.assert_close(found, expected[own], rtol=1e-12, atol=1e-13)
    assert mine.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(mine.grad, whole.grad[own], rtol=1e-12, atol=1e-13)
    for name, weight in moe.experts.named_parameters():
        gradient = alone.experts.get_parameter(name).grad
        assert gradient is not None
        assert isinstance(weight.grad, DTensor)
        torch.testing.assert_close(weight.grad.to_local(), gradient.chunk(4)[rank], rtol=1e-11, atol=1e-13)
    total = moe.expert_tokens.clone()
    dist.all_reduce(total)
    assert torch.equal(total, alone.expert_tokens)
    assert total[[0, 4, 5]].tolist() == [0, 0, 0]


LAYOUTS = {
    "expert 2 over shard": Layout(shard=2, expert=2),
    "expert 2 over tensor": Layout(tensor=2, expert=2),
    "expert 1 beside tensor 2": Layout(tensor=2),
    "expert 2 over context": Layout(context=2, expert=2),
    "expert 4 over shard": Layout(shard=4, expert=4),
    "expert 2 within shard 4": Layout(shard=4, expert=2),
    "expert 1 over shard 2 × tensor 2": Layout(shard=2, tensor=2),
    "expert 2 over shard 2 × tensor 2": Layout(shard=2, tensor=2, expert=2),
    "expert 4 over shard 2 × tensor 2": Layout(shard=2, tensor=2, expert=4),
    "expert 2 within tensor 4": Layout(tensor=4, expert=2),
    "expert 2 with two copies": Layout(replicate=2, shard=2, expert=2),
    "expert 4 over context 2 × tensor 2": Layout(context=2, tensor=2, expert=4),
    "1F1B": Layout(pipeline=2, shard=2, expert=2),
    "InterleavedZeroBubble": Layout(
        pipeline=2, tensor=2, expert=2, schedule="InterleavedZeroBubble", stages_per_rank=2
    ),
    "ZBVZeroBubble": Layout(pipeline=2, shard=2, expert=2, schedule="ZBVZeroBubble", stages_per_rank=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_gradients_of_every_parameter_are_those_of_a_single_process(layout: Layout) -> None:
    heads = {"heads": 4, "kv_heads": 4} if layout.tensor == 4 else {}
    case = Case(layout, mixture(layers=4 if layout.stages == 4 else 2, dense_layers=1, **heads))
    run_ranks(layout.world_size, compare(case))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"recompute": "full"}, id="full"),
        pytest.param({"recompute": "selective"}, id="selective"),
        pytest.param({"compile_backend": "aot_eager"}, id="compiled", marks=pytest.mark.slow),
    ],
)
def test_recompute_and_compile_change_nothing(options: dict[str, Any]) -> None:
    layout = Layout(shard=2, expert=2)
    case = Case(layout, mixture(layers=1), options=options)
    # Ranks wait for the slower one to compile.
    run_ranks(2, compare(case, then=partial(_each_token_counted_once, layout=layout)), timeout=250)


def _each_token_counted_once(engine: Engine, _reference: Decoder, *, layout: Layout) -> None:
    """``compare`` has run two steps of 4 micro-batches of 1 × 16 tokens on each data-parallel rank."""
    for layer in mixtures(engine.parts):
        tokens = layer.expert_tokens.clone()
        dist.all_reduce(tokens)
        assert int(tokens.sum()) == 2 * 4 * 16 * layout.data_width * 2


@pytest.mark.parametrize(
    "layout",
    [Layout(shard=2, tensor=2, expert=2), Layout(replicate=2, context=2), Layout(pipeline=2, shard=2, expert=2)],
    ids=["shard-tensor", "replicate-context", "pipeline"],
)
def test_all_ranks_move_the_bias_as_a_single_process_does(layout: Layout) -> None:
    run_ranks(4, partial(_balanced, case=Case(layout, mixture(balance_rate=0.25))))


def _balanced(rank: int, *, case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    reference, _ = single(case)
    engine = build(case)
    batch = global_batch(case)
    mine = share(batch, case.layout, rank)
    engine.evaluate(mine)
    engine.forward_backward(mine, batch.tokens)
    engine.evaluate(mine)
    balance = update_balance(engine.parts, engine.meshes)
    alone = {name: module for name, module in reference.named_modules() if isinstance(module, MoE)}
    worst = torch.zeros((), dtype=torch.float64)
    for part in engine.parts:
        for name, module in part.named_modules():
            if isinstance(module, MoE):
                tokens = alone[name].expert_tokens.double()
                assert module.router_bias is not None
                assert torch.equal(module.router_bias, (0.25 * torch.sign(tokens.mean() - tokens)).float())
                assert not module.expert_tokens.any()
                worst = torch.maximum(worst, tokens.max() / tokens.mean())
    assert worst > 1
    torch.testing.assert_close(balance.worst, worst, rtol=1e-12, atol=0)


def test_a_model_without_experts_has_nothing_to_balance() -> None:
    run_ranks(1, _dense)


def _dense(_rank: int) -> None:
    meshes = Meshes.build(Layout(), CPU)
    assert float(update_balance([Decoder(mixture(experts=0))], meshes).worst) == 0.0
