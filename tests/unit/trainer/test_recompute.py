"""Recomputing and compiling change memory and speed, and no gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forked import run_ranks
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.parallel.compiling import compile_blocks, watch_compilation
from lockstep_trainer.parallel.recompute import Recompute, recompute_blocks
from lockstep_trainer.sections import Sections
from lockstep_trainer.steprecord import StepWriter

CONFIG = DecoderConfig(
    dim=32, layers=10, heads=4, kv_heads=2, ffn_dim=64, vocab_size=64, qk_norm=True, rope_theta=10_000.0
)
MODES: tuple[Recompute, ...] = ("none", "selective", "full")
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(3))


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        return result


def model(change: Callable[[nn.Module], None] = lambda part: None, config: DecoderConfig = CONFIG) -> Decoder:
    """The same weights each time, in float64."""
    torch.manual_seed(1)
    decoder = Decoder(config).double()
    change(decoder)
    return decoder


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    decoder(TOKENS).logsumexp(-1).sum().backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", MODES[1:])
def test_gradients_are_bitwise_those_without(mode: Recompute) -> None:
    expected = gradients(model())
    found = gradients(model(lambda part: recompute_blocks(part, mode)))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_mode_keeps_less_than_the_one_before() -> None:
    """Bytes alive between forward and backward. What ``full`` keeps of a block is its input."""
    kept = {}
    for mode in MODES:
        decoder = model(lambda part, mode=mode: recompute_blocks(part, mode))  # type: ignore[misc]
        with Live() as live:
            logits = decoder(TOKENS)
        kept[mode] = sum(live.alive.values())
        del logits
    assert kept["selective"] < 0.75 * kept["none"]
    assert kept["full"] < 0.4 * kept["none"]


def test_a_block_can_be_repeated_for_inputs_and_weights_apart() -> None:
    """As the schedules do that split the backward pass."""
    expected = gradients(model())
    for mode in MODES[1:]:
        decoder = model(lambda part, mode=mode: recompute_blocks(part, mode))  # type: ignore[misc]
        block = decoder.blocks["4"]
        outputs: list[Tensor] = []
        hook = block.register_forward_hook(lambda module, args, result, seen=outputs: seen.append(result))
        total = decoder(TOKENS).logsumexp(-1).sum()
        hook.remove()
        (arriving,) = torch.autograd.grad(total, outputs, retain_graph=True)
        weights = list(block.parameters())
        found = torch.autograd.grad(outputs, weights, arriving)
        for (name, _), gradient in zip(block.named_parameters(), found, strict=True):
            torch.testing.assert_close(gradient, expected[f"blocks.4.{name}"], rtol=1e-12, atol=1e-14)


def test_a_kept_result_that_was_changed_in_place_is_refused() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(x).mul_(2)
            return y.sin()

    part = nn.Module()
    part.blocks = nn.ModuleDict({"0": Careless()})
    recompute_blocks(part, "selective")
    with pytest.raises(RuntimeError, match="changed in place"):
        part.blocks["0"](torch.ones(2, 4)).sum().backward()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="none of none, selective, full"):
        recompute_blocks(model(), "some")  # type: ignore[arg-type]


def test_compiled_blocks_have_the_same_gradients_and_share_their_code() -> None:
    """Ten blocks would exceed dynamo's limit of eight versions of one function, and then run uncompiled."""

    def compare(rank: int) -> None:
        from torch._dynamo.utils import counters

        expected = gradients(model())
        for mode in MODES:
            torch._dynamo.reset()
            counters.clear()

            def change(part: nn.Module, mode: Recompute = mode) -> None:
                recompute_blocks(part, mode)
                compile_blocks(part, "aot_eager")

            found = gradients(model(change))
            assert counters["stats"]["unique_graphs"] == 1
            assert not counters["graph_break"]
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)

    run_ranks(1, compare, timeout=200)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.up(x).sin()
        return y


class Embedded(nn.Module):
    """An embedding that tensor parallelism spreads, and a block that takes its output as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.blocks = nn.ModuleDict({"0": Layer()})

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.blocks["0"](self.embedding(tokens))
        return y


def test_an_input_under_way_keeps_its_gradient_in_compiled_code() -> None:
    """Without the wait the embedding's gradient is exactly zero, and nothing says so (pytorch#191113)."""
    tokens = torch.arange(12).reshape(2, 6)

    def compare(rank: int) -> None:
        torch.manual_seed(0)
        whole = Embedded().double()
        whole(tokens).square().sum().backward()
        torch.manual_seed(0)
        split = Embedded().double()
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "tensor"))
        plan = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=True)
        parallelize_module(split.embedding, mesh["tensor"], plan)
        compile_blocks(split, "aot_eager")
        for module in (split.blocks["0"], split):
            fully_shard(module, mesh=mesh["shard"])
        split(tokens).square().sum().backward()
        found, expected = split.embedding.weight.grad, whole.embedding.weight.grad
        assert isinstance(found, DTensor)
        assert expected is not None
        torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-12, atol=1e-14)
        dist.barrier()

    run_ranks(2, compare, timeout=200)


def test_compilation_is_a_section_of_its_own(tmp_path: Path) -> None:
    """Whenever it comes: the ledger counts it apart, and no bound for a hung step applies."""
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager", dynamic=False)
    with StepWriter.create(tmp_path / "steps") as records:
        sections = Sections(records)
        forget = watch_compilation(sections)
        try:
            with sections("forward"):
                compiled(torch.ones(3))
            first = sections.take()
            with sections("forward"):
                compiled(torch.ones(3))
            again = sections.take()
            with sections("evaluate"):
                compiled(torch.ones(4))
            evaluation = sections.take()
        finally:
            forget()
    assert 0 < first["compile"] < first["forward"]
    assert set(again) == {"forward"}
    assert set(evaluation) == {"evaluate"}
