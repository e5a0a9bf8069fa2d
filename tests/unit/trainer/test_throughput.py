"""Throughput, precision and the settings of the process."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch import nn

from lockstep_trainer.errors import UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.precision import check_precision, convert_to_float8, takes_float8
from lockstep_trainer.runtime import ALLOCATOR, Garbage, refused, refusing, set_allocator
from lockstep_trainer.throughput import Meter

CPU = torch.device("cpu")
CONFIG = DecoderConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab_size=64)


def test_mfu_is_the_models_flops_over_what_all_devices_could_do() -> None:
    """1,000 FLOPs a token, 64 tokens in 2 s on 4 devices of 10,000 FLOP/s: 8 tokens/s each, 0.8 of the peak."""
    done = Meter(1000.0, ranks=4, peak=10_000.0, device=CPU).step(64, 2.0)
    assert (done.tokens_per_second, done.memory) == (32.0, 0)
    assert done.mfu == pytest.approx(0.8)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    meter = Meter.of(CONFIG, sequence_length=16, ranks=1, precision="bf16", device=CPU)
    assert meter.step(64, 2.0).mfu is None
    assert meter.flops_per_token > 6 * 2 * 32 * 64 * 3  # at least the feed-forward part


def test_garbage_is_collected_in_the_same_steps_whenever_a_rank_started() -> None:
    garbage = Garbage(every=5)
    assert [step for step in range(1, 16) if garbage.due(step)] == [5, 10, 15]
    garbage.take_over()
    try:
        assert not gc.isenabled()
        loop: list[object] = []
        loop.append(loop)
        del loop
        assert garbage.collect() >= 1
    finally:
        garbage.give_back()
    assert gc.isenabled()


def test_what_the_user_sets_for_the_allocator_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    set_allocator(torch.device("cuda", 0))
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    set_allocator(CPU)
    assert not told
    set_allocator(torch.device("cuda", 0))
    assert told == [ALLOCATOR]


def test_an_operation_without_a_deterministic_kernel_is_refused_within_a_step_only() -> None:
    before = torch.get_deterministic_debug_mode()
    try:
        with refusing(True):
            assert torch.get_deterministic_debug_mode() == 2  # error
        assert torch.get_deterministic_debug_mode() == 1  # warn
        with refusing(False):
            assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode(before)
    assert refused(RuntimeError("kthvalue CUDA does not have a deterministic implementation, but you set …"))
    assert not refused(RuntimeError("CUDA out of memory"))


def test_float8_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match="float8 needs a GPU, and this worker runs on cpu; choose bf16 or fp32"):
        check_precision("float8", CPU)
    check_precision("bf16", CPU)


def test_float8_takes_the_matrices_of_blocks_whose_sides_suit() -> None:
    odd = DecoderConfig(dim=32, layers=1, heads=4, kv_heads=1, ffn_dim=40, vocab_size=64)
    with torch.device("meta"):
        part = Decoder(odd)
    taken = {name for name, module in part.named_modules() if takes_float8(module, name)}
    # Keys and values are 8 wide, the feed-forward part 40.
    assert taken == {"blocks.0.attention.query", "blocks.0.attention.output"}


def test_float8_converts_the_tree_and_leaves_the_names() -> None:
    pytest.importorskip("torchao.float8", reason="torchao is an extra of GPU images")
    with torch.device("meta"):
        part = Decoder(CONFIG)
    names = [name for name, _ in part.named_parameters()]
    assert convert_to_float8(part) == 2 * 7
    assert [name for name, _ in part.named_parameters()] == names
    assert type(part.head) is nn.Linear
    assert type(part.get_submodule("blocks.0.ffn.up")) is not nn.Linear


def test_without_torchao_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match="install torchao in the image, or choose bf16"):
        convert_to_float8(nn.Module())
