"""Cutting sequences over ranks changes nothing: every gradient agrees with a single process in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from forked import run_ranks
from lockstep_trainer.errors import UserError
from lockstep_trainer.model.attention import Core
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.init import initial_weight
from lockstep_trainer.parallel.context import GatheredCore, UlyssesCore, apply_context, local, prefix_attention, restore
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes

CPU = torch.device("cpu")
CONFIG = DecoderConfig(dim=32, layers=2, heads=8, kv_heads=4, ffn_dim=48, vocab_size=61, qk_norm=True)
LENGTH = 24  # 2 × 4 chunks of 3: no power of two
WINDOW = 7
BOUND = 1e-9

KINDS = {
    "grouped": CONFIG,
    "all-heads": replace(CONFIG, kv_heads=8),
    "one-key": replace(CONFIG, kv_heads=1),
    "window": replace(CONFIG, window=WINDOW),
    "alibi": replace(CONFIG, positions="alibi", qk_norm=False),
    "learned": replace(CONFIG, positions="learned", max_length=LENGTH, tie_embeddings=True),
}


def documents() -> tuple[Tensor, Tensor]:
    """Positions and documents of two samples; documents of one token, of one chunk's inside, and over many chunks."""
    lengths = [[1, 10, 1, 1, 11], [2, 3, 18, 1]]
    numbers = [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths]
    places = [[place for length in row for place in range(length)] for row in lengths]
    return torch.tensor(places), torch.tensor(numbers)


def build(config: DecoderConfig) -> Decoder:
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Ten times what training starts with: attention that looks at something.
            weight = initial_weight(name, parameter.shape, config, 5, CPU)
            parameter.copy_(weight * 10 if weight.dim() > 1 else weight)
    return model


def tokens(samples: int = 2) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (samples, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (2 * LENGTH)


def reference(config: DecoderConfig, packed: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits and gradients of a single process."""
    model = build(config)
    logits = model(tokens()[:, :-1], *(documents() if packed else ()))
    loss = loss_of(logits, tokens()[:, 1:])
    loss.backward()
    return loss.detach(), logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, layout: Layout, rank: int, packed: bool) -> tuple[Tensor, Tensor]:
    """Loss and logits of this rank's share of all tokens; its gradients are left in the model."""

    def share(whole: Tensor) -> Tensor:
        return local(whole, layout, rank)

    logits = model(share(tokens()[:, :-1]), *((share(each) for each in documents()) if packed else ()))
    loss = loss_of(logits, share(tokens()[:, 1:]))
    loss.backward()
    return loss.detach(), logits.detach()


def assert_close(name: str, got: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    error = float((got - expected).norm() / expected.norm())
    assert error <= bound, f"{name}: relative error {error:.1e}"


def compare(model: nn.Module, layout: Layout, rank: int, packed: bool, config: DecoderConfig) -> None:
    """One step of ``model`` against one process: loss, logits in order, every gradient."""
    expected_loss, expected_logits, gradients = reference(config, packed)
    loss, logits = step(model, layout, rank, packed)
    dist.all_reduce(loss)
    assert_close("loss", loss, expected_loss)
    shares = [torch.empty_like(logits) for _ in range(layout.context)]
    dist.all_gather(shares, logits)
    assert_close("logits", restore(shares, layout), expected_logits)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == gradients.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        dist.all_reduce(parameter.grad)
        assert_close(name, parameter.grad, gradients[name])


def layouts(method: str, ranks: int) -> Layout:
    return Layout(context=ranks, context_method="ulysses" if method == "ulysses" else "allGather")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", ["allGather", "ulysses"])
def test_every_gradient_matches_a_single_process(method: str, ranks: int) -> None:
    def body(rank: int) -> None:
        torch.set_default_dtype(torch.float64)
        layout = layouts(method, ranks)
        meshes = Meshes.build(layout, CPU)
        for config in KINDS.values():
            if method == "ulysses" and config.kv_heads % ranks:
                continue  # refused by Layout.check
            for packed in (False, True):
                model = build(config)
                apply_context(model, layout, meshes)
                compare(model, layout, rank, packed, config)

    run_ranks(ranks, body)


def test_compiled_cores_have_no_break() -> None:
    """In a group of one rank, to compile once; the parity matrix compiles whole blocks on several."""

    def body(_rank: int) -> None:
        group = dist.group.WORLD
        assert group is not None
        generator = torch.Generator().manual_seed(3)
        shapes = [(2, heads, LENGTH, 8) for heads in (CONFIG.heads, CONFIG.kv_heads, CONFIG.kv_heads)]
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-WINDOW)[None, None]
        for core in (GatheredCore(group), UlyssesCore(group)):
            compiled = torch.compile(core.forward, backend="aot_eager", fullgraph=True)
            for mask in (None, seen):
                for given, expected in zip(outcome(compiled, inputs, mask), outcome(Core(), inputs, mask), strict=True):
                    assert_close("compiled core", given, expected)

    run_ranks(1, body)


def outcome(core: Callable[..., Tensor], inputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """What a core gives, and the gradients of query, key and value."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    mixed = core(*leaves, mask)
    (mixed * torch.linspace(-1, 1, mixed.numel(), dtype=mixed.dtype).view_as(mixed)).sum().backward()
    return [mixed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("method", ["allGather", "ulysses"])
def test_recomputed_blocks_give_the_same(method: str) -> None:
    def body(rank: int) -> None:
        torch.set_default_dtype(torch.float64)
        layout = layouts(method, 2)
        meshes = Meshes.build(layout, CPU)
        model = build(CONFIG)
        apply_context(model, layout, meshes)
        for block in model.blocks.values():
            inner = block.forward
            block.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
        compare(model, layout, rank, True, CONFIG)

    run_ranks(2, body)


@pytest.mark.parametrize("method", ["allGather", "ulysses"])
def test_weights_sharded_over_data_and_context_ranks(method: str) -> None:
    """Two data ranks with a sample each × two context ranks; weights over all four, gradients as plain sums."""

    def body(rank: int) -> None:
        torch.set_default_dtype(torch.float64)
        layout = replace(layouts(method, 2), shard=2)
        meshes = Meshes.build(layout, CPU)
        _, _, expected = reference(CONFIG, True)
        model = build(CONFIG)
        apply_context(model, layout, meshes)
        for module in [*model.blocks.values(), model]:
            wrapped = fully_shard(module, mesh=meshes.fsdp)
            wrapped.set_gradient_divide_factor(1.0)
            wrapped.set_force_sum_reduction_for_comms(True)
        sample = slice(layout.data_rank(rank), layout.data_rank(rank) + 1)
        inputs, targets = tokens()[sample, :-1], tokens()[sample, 1:]
        share = [local(each, layout, rank) for each in (inputs, *(each[sample] for each in documents()))]
        loss_of(model(*share), local(targets, layout, rank)).backward()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            assert_close(name, parameter.grad.full_tensor(), expected[name])

    run_ranks(4, body)


# ------------------------------------------------------------------------------------------- work and traffic


class Counter(TorchDispatchMode):
    """Query-key pairs that attention was given, and bytes that came from other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith("aten::_scaled_dot_product") and "backward" not in name:
            query, key = args[:2]
            self.pairs += query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        if name.startswith("_c10d_functional::all_gather"):
            self.received += result.nbytes - args[0].nbytes
        if name.startswith("_c10d_functional::reduce_scatter"):
            self.received += args[0].nbytes - result.nbytes
        if name.startswith("_c10d_functional::all_to_all"):
            self.received += result.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
        return result


@pytest.mark.parametrize("method", ["allGather", "ulysses"])
def test_ranks_share_work_evenly_and_receive_what_the_formula_says(method: str) -> None:
    """Float32, where the fused kernel shows its shapes."""
    ranks, samples = 4, 2

    def body(rank: int) -> None:
        layout = layouts(method, ranks)
        model = build(CONFIG)
        apply_context(model, layout, Meshes.build(layout, CPU))
        with Counter() as counter:
            step(model, layout, rank, False)
        share, heads, keys, width = LENGTH // ranks, CONFIG.heads, CONFIG.kv_heads, CONFIG.head_dim
        chunk = share // 2
        if method == "ulysses":
            pairs = samples * heads // ranks * LENGTH * LENGTH  # the kernel leaves out half of them
            elements = 2 * samples * (2 * heads + 2 * keys) * share * width * (ranks - 1) // ranks
        else:
            # The chunks of any rank r see r + 1 and 2n − r chunks: the same 2n + 1 on every rank.
            pairs = samples * heads * chunk * chunk * (2 * ranks + 1)
            elements = 2 * 2 * samples * keys * (LENGTH - share) * width
        assert counter.pairs == CONFIG.layers * pairs
        assert counter.received == CONFIG.layers * elements * 4

    run_ranks(ranks, body)


# -------------------------------------------------------------------------------------------------- on one rank


@pytest.mark.parametrize("method", ["allGather", "ulysses"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_put_back_are_the_sequence(method: str, ranks: int) -> None:
    layout = replace(layouts(method, ranks), shard=2, tensor=2)
    whole = torch.arange(2 * LENGTH * 3).view(2, LENGTH, 3)
    for first in (0, ranks * 2):  # either data rank
        shares = [local(whole, layout, first + 2 * at) for at in range(ranks)]
        assert all(share.shape == (2, LENGTH // ranks, 3) for share in shares)
        assert restore(shares, layout).equal(whole)
    last = [local(whole.mT, layout, 2 * at, dim=2) for at in range(ranks)]
    assert restore(last, layout, dim=2).equal(whole.mT)


def test_tensor_ranks_hold_the_same_share() -> None:
    layout = Layout(context=2, tensor=2)
    whole = torch.arange(8).view(1, 8)
    assert local(whole, layout, 0).tolist() == local(whole, layout, 1).tolist() == [[0, 1, 6, 7]]
    assert local(whole, layout, 2).tolist() == local(whole, layout, 3).tolist() == [[2, 3, 4, 5]]


def test_a_sequence_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UserError, match="2 ranks cut a sequence into 4 equal parts, and 10 tokens are no multiple"):
        local(torch.zeros(1, 10), Layout(context=2), 0)


def test_queries_at_the_end_of_their_keys_see_the_keys_before_them() -> None:
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 5, 4)
    value = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 4)
    mixed = prefix_attention(query, key, value, None)  # equal scores: the mean of the values seen
    assert mixed[0, 0, :, 0].tolist() == [1.5, 2.0]
