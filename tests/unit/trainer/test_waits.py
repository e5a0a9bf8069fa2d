"""What a rank waits for the others is measured where it waits, for each dimension of the mesh, and no work with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from composed import Case, build, global_batch, share
from dispatched import Order, Watched, communicates
from forked import one_after_the_other, run_ranks
from lockstep_trainer.measuring.clocks import HostClock
from lockstep_trainer.measuring.ownwork import OwnWork
from lockstep_trainer.measuring.waits import Waits
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout

pytestmark = pytest.mark.timeout(600)

CONFIG = DecoderConfig(dim=24, layers=4, heads=4, kv_heads=2, ffn_dim=36, vocab_size=132, qk_norm=True)
SMALL = replace(CONFIG, layers=2)
MIXTURE = replace(SMALL, experts=4, experts_per_token=2, expert_dim=16)
ALL, SOME = 1.0, 0.0

LAYOUTS: dict[str, tuple[Case, dict[str, float]]] = {
    # Dimension → share of the step's communication that lies within its windows at least; more than SOME.
    "data": (Case(Layout(shard=2), SMALL, 2), {"data": ALL}),
    "replicas": (Case(Layout(replicate=2), SMALL, 2), {"data": ALL}),
    "recomputed": (Case(Layout(shard=2), SMALL, 2, options={"recompute": "full"}), {"data": ALL}),
    "tensor": (Case(Layout(tensor=2), SMALL, 2), {"tensor": SOME}),
    "tensor, recomputed": (Case(Layout(tensor=2), SMALL, 2, options={"recompute": "full"}), {"tensor": SOME}),
    "gathered context": (Case(Layout(context=2), SMALL, 2), {"context": SOME}),
    "ulysses": (Case(Layout(context=2, context_method="ulysses"), SMALL, 2), {"context": SOME}),
    "pipeline": (Case(Layout(pipeline=2), CONFIG), {"pipeline": 0.5}),
    "zero bubble": (
        Case(Layout(pipeline=2, schedule="ZBVZeroBubble", stages_per_rank=2), CONFIG),
        {"pipeline": 0.5},
    ),
    "experts": (Case(Layout(shard=2, expert=2), MIXTURE, 2), {"data": SOME}),
}


def measured(engine: Engine, case: Case) -> tuple[OwnWork, Waits]:
    own = OwnWork.of(engine, compiled=False, recomputed="recompute" in case.options)
    return own, Waits.of(engine, own, compiled=False, clock=HostClock)


def step(engine: Engine, case: Case) -> None:
    batch = global_batch(case)
    engine.forward_backward(share(batch, case.layout, dist.get_rank()), batch.tokens)


def windows_are_where_it_waits(case: Case, least: dict[str, float]) -> Callable[[int], None]:
    def body(_: int) -> None:
        torch.set_default_dtype(torch.float64)
        engine = build(case)
        own, waits = measured(engine, case)
        assert waits.clocks.keys() == least.keys()
        step(engine, case)
        assert not any(waits.take().values()), "outside of a training step nothing is counted"
        done: list[str] = []
        orders = {name: Order(done) for name in least}
        own.clock = windows = Order(done)
        for name, clock in waits.clocks.items():
            waits.clocks[name].mark, waits.clocks[name].add = orders[name].mark, orders[name].add  # type: ignore[method-assign]
            assert clock.take() == 0.0
        with own.step(), waits.step(), Watched(windows):
            step(engine, case)
        told = sum(map(communicates, done))
        for name, share_of_all in least.items():
            within = orders[name].within()
            assert sum(map(communicates, within)) >= max(share_of_all * told, 1), name
            assert "aten.mm" not in within, f"{name}: no matrix product is waiting"

    return body


def test_windows_hold_the_collectives_of_their_dimension_and_no_work() -> None:
    bodies = {name: windows_are_where_it_waits(case, least) for name, (case, least) in LAYOUTS.items()}
    run_ranks(2, one_after_the_other(bodies), timeout=240)
