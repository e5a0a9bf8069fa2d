"""The engine's gradients, sums, evaluation and logits are the single process's, in float64, at every schedule.

Compositions with more axes are in ``tests/parity``; here each rank is forked once for several schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from composed import CPU, Case, build, check_gradients, compare, global_batch, share, single, whole
from forked import run_ranks
from lockstep_trainer.batch import Batch
from lockstep_trainer.errors import UserError
from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.parallel import sharded
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes

CONFIG = DecoderConfig(dim=24, layers=6, heads=4, kv_heads=2, ffn_dim=36, vocab_size=132, qk_norm=True)
TIED = replace(CONFIG, tie_embeddings=True)


def layout(schedule: str, pipeline: int = 2, **degrees: int) -> Layout:
    stages = 1 if schedule in ("GPipe", "1F1B") else 2
    return Layout(pipeline=pipeline, schedule=schedule, stages_per_rank=stages, **degrees)


def one_after_the_other(*bodies: Callable[[int], None]) -> Callable[[int], None]:
    def body(rank: int) -> None:
        for run in bodies:
            run(rank)

    return body


def evaluates(case: Case) -> Callable[[Engine, Decoder], None]:
    """Evaluation, logits, and a step behind them agree with the single process."""

    def check(engine: Engine, model: Decoder) -> None:
        batch = global_batch(case)
        own = share(batch, case.layout, dist.get_rank())
        found = engine.evaluate(own)
        dist.all_reduce(found)
        with torch.no_grad():
            _, expected = Loss(1e-3)(model(batch.inputs, batch.positions, batch.documents), batch.targets)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        for length, last in ((1, 3), (5, 3), (16, 1)):
            text = batch.inputs[:1, :length]
            with torch.no_grad():
                expected = model(text)[:, -last:]
            torch.testing.assert_close(engine.logits(text, last), expected, rtol=1e-10, atol=1e-12)
        for _, parameter in engine.named_parameters():
            parameter.grad = None
        engine.forward_backward(own, batch.tokens)
        check_gradients(engine, model)

    return check


def with_evaluation(case: Case) -> Callable[[int], None]:
    return compare(case, then=evaluates(case))


def test_schedules_of_one_stage_and_loops() -> None:
    schedules = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
    cases = [Case(layout(schedule), TIED, documents=True) for schedule in schedules]
    run_ranks(2, one_after_the_other(*map(with_evaluation, cases)), timeout=120)


def test_v_shaped_schedules_have_one_tied_table_on_the_first_rank() -> None:
    def one_table(engine: Engine, model: Decoder) -> None:
        names = [name for name, _ in engine.named_parameters()]
        assert names.count("embedding.weight") == (1 if dist.get_rank() == 0 else 0)
        assert not engine.second_copies

    cases = [Case(layout(schedule), TIED, documents=True) for schedule in ("ZBVZeroBubble", "DualPipeV")]
    run_ranks(2, one_after_the_other(*map(with_evaluation, cases), compare(cases[0], then=one_table)), timeout=120)


def test_data_parallel_with_and_without_a_pipeline() -> None:
    """Training behind an evaluation, too: parameters that its forward pass left gathered would get no gradient."""
    run_ranks(2, with_evaluation(Case(Layout(shard=2), CONFIG, documents=True)), timeout=120)
    schedules = ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
    cases = [Case(layout(schedule, shard=2), TIED) for schedule in schedules]
    run_ranks(4, one_after_the_other(*map(with_evaluation, cases)), timeout=120)


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_why_parameters_stay_gathered_in_a_pipeline(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given back behind the forward pass, as FSDP's default is, parameters get no gradient or a part of it, without a
    word: the split backward pass looks for the ones that were in the graph."""
    case = Case(layout(schedule, shard=2), CONFIG)

    def resharding(module: nn.Module, **options: Any) -> nn.Module:
        return fully_shard(module, **{**options, "reshard_after_forward": True})

    monkeypatch.setattr(sharded, "fully_shard", resharding)

    def body(rank: int) -> None:
        torch.set_default_dtype(torch.float64)
        expected = {name: parameter.grad for name, parameter in single(case)[0].named_parameters()}
        engine = build(case)
        batch = global_batch(case)
        engine.forward_backward(share(batch, case.layout, rank), batch.tokens)
        wrong = torch.zeros(())
        for name, parameter in engine.named_parameters():
            right = expected[name]
            assert right is not None
            wrong += parameter.grad is None or bool((whole(parameter.grad) - right).norm() > 0.1 * right.norm())
        dist.all_reduce(wrong)
        assert wrong > 0, "every gradient is right: parameters need not stay gathered any more"

    run_ranks(4, body)


def test_numbers_of_micro_batches_that_are_no_multiple_of_the_ranks() -> None:
    odd = [("GPipe", 1), ("1F1B", 3), ("Interleaved1F1B", 3), ("InterleavedZeroBubble", 1), ("ZBVZeroBubble", 3)]
    cases = [Case(layout(schedule), TIED, micro_batches=number, micro_batch_size=2) for schedule, number in odd]
    run_ranks(2, one_after_the_other(*map(compare, cases)), timeout=120)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_blocks_may_be_recomputed_where_gradients_of_weights_come_apart(recompute: str) -> None:
    schedules = ("InterleavedZeroBubble", "ZBVZeroBubble")
    cases = [Case(layout(schedule), TIED, options={"recompute": recompute}) for schedule in schedules]
    run_ranks(2, one_after_the_other(*map(compare, cases)), timeout=120)


class Custom(nn.Module):
    """A user's model, with a dropout that must be off in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(132, 8)
        self.out = nn.Linear(8, 132)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(nn.functional.dropout(self.table(tokens).cumsum(1), 0.5, self.training)) * self.scale
        return logits


def test_a_model_of_the_users_own_goes_the_same_way() -> None:
    case = Case(Layout(shard=2), CONFIG)

    def body(rank: int) -> None:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        model = Custom()
        batch = global_batch(case)
        with torch.no_grad():
            _, expected = Loss()(model.eval()(batch.inputs), batch.targets)
            last = model(batch.inputs[:2])[:, -1:]
        model.train()
        meshes = Meshes.build(case.layout, CPU)
        fully_shard(model, mesh=meshes.fsdp)
        engine = Engine([model], case.layout, meshes, Loss(), micro_batch_size=2, device=CPU, dtype=torch.float64)
        own = share(batch, case.layout, rank)
        sums = engine.evaluate(Batch(own.inputs[:3], own.targets[:3]))  # not a multiple of the micro-batch
        sums += engine.evaluate(Batch(own.inputs[3:], own.targets[3:]))
        dist.all_reduce(sums)
        torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(engine.logits(batch.inputs[:2]), last, rtol=1e-12, atol=0)
        assert model.training
        assert set(engine.state()) == {"table.weight", "out.weight", "out.bias", "scale"}
        engine.forward_backward(own, batch.tokens)
        assert all(parameter.grad is not None for _, parameter in engine.named_parameters())

    run_ranks(2, body)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    case = Case(layout("1F1B"), CONFIG, micro_batches=4)

    def body(rank: int) -> None:
        engine = build(case)
        batch = global_batch(case)
        with pytest.raises(UserError, match="can't do 1 micro-batches per step, the next number it can do is 2"):
            engine.forward_backward(Batch(batch.inputs[:1], batch.targets[:1]), 1)
        engine.micro_batch_size = 3
        with pytest.raises(UserError, match="3 does not divide the 4 samples"):
            engine.forward_backward(batch, 1)

    run_ranks(2, body)


def test_the_last_rank_has_the_second_copy_of_a_tied_table() -> None:
    def body(rank: int) -> None:
        engine = build(Case(layout("1F1B", 3), TIED))
        assert engine.second_copies == (frozenset({"embedding.weight"}) if rank == 2 else frozenset())
        assert ("embedding.weight" in engine.state()) == (rank in (0, 2))

    run_ranks(3, body)
