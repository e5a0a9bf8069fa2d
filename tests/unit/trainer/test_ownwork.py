"""A rank's own work: what a step computes stays to the last bit, and no window waits for another rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from composed import Case, build, global_batch, share, whole
from dispatched import Order, Watched, communicates
from forked import one_after_the_other, run_ranks
from lockstep_trainer.batch import Batch
from lockstep_trainer.measuring.ownwork import Amount, OwnWork
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout

pytestmark = pytest.mark.timeout(600)

CONFIG = DecoderConfig(dim=24, layers=4, heads=4, kv_heads=2, ffn_dim=36, vocab_size=132, qk_norm=True)
SMALL = replace(CONFIG, layers=2)
MIXTURE = replace(SMALL, experts=4, experts_per_token=2, expert_dim=16)

LAYOUTS: dict[str, tuple[Case, bool]] = {
    "data": (Case(Layout(shard=2), SMALL, 2), True),
    "replicas": (Case(Layout(replicate=2), SMALL, 2, documents=True), True),
    "recomputed": (Case(Layout(shard=2), SMALL, 2, options={"recompute": "full"}), True),
    "selective": (Case(Layout(shard=2), SMALL, 2, options={"recompute": "selective"}), True),
    "pipeline": (Case(Layout(pipeline=2), CONFIG), True),
    "zero bubble": (Case(Layout(pipeline=2, schedule="ZBVZeroBubble", stages_per_rank=2), CONFIG), True),
    "tensor": (Case(Layout(tensor=2), SMALL, 2), True),
    "tensor, recomputed": (Case(Layout(tensor=2), SMALL, 2, options={"recompute": "full"}), True),
    "context": (Case(Layout(context=2), SMALL, 2), True),
    "experts": (Case(Layout(shard=2, expert=2), MIXTURE, 2), True),
    "experts and tensor": (Case(Layout(tensor=2), MIXTURE, 2), True),
    "experts and context": (Case(Layout(context=2), MIXTURE, 2), False),
}


def step(engine: Engine, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    for _, parameter in engine.named_parameters():
        parameter.grad = None
    batch = global_batch(case)
    sums = engine.forward_backward(share(batch, case.layout, dist.get_rank()), batch.tokens)
    return sums, {name: whole(parameter.grad) for name, parameter in engine.named_parameters()}  # type: ignore[arg-type]


def measured(case: Case, engine: Engine) -> OwnWork:
    return OwnWork.of(engine, compiled=False, recomputed="recompute" in case.options)


def same_bits_and_some_time(case: Case, measures: bool) -> Callable[[int], None]:
    def body(rank: int) -> None:
        torch.set_default_dtype(torch.float64)
        sums, gradients = step(build(case), case)
        engine = build(case)
        own = measured(case, engine)
        assert own.take() == (0.0 if measures else None)
        with own.step():
            again, others = step(engine, case)
        assert torch.equal(sums, again)
        assert all(torch.equal(gradients[name], other) for name, other in others.items())
        seconds = own.take()
        assert (seconds is not None) == measures
        assert seconds is None or seconds > 0
        engine.evaluate(share(global_batch(case), case.layout, rank))
        assert own.take() == (0.0 if measures else None), "an evaluation is no part of a step"

    return body


def test_every_bit_is_the_same_as_without_it() -> None:
    bodies = {name: same_bits_and_some_time(case, measures) for name, (case, measures) in LAYOUTS.items()}
    run_ranks(2, one_after_the_other(bodies), timeout=240)


def no_collective_is_within(case: Case, share_of_products: float) -> Callable[[int], None]:
    def body(_: int) -> None:
        torch.set_default_dtype(torch.float64)
        engine = build(case)
        own = measured(case, engine)
        own.clock = order = Order()
        with own.step(), Watched(order):
            step(engine, case)
        products = order.done.count("aten.mm")
        assert any(map(communicates, order.done)), "the ranks have to wait for each other somewhere"
        assert not [name for name in order.within() if communicates(name)]
        assert order.within().count("aten.mm") >= share_of_products * products > 0

    return body


def test_no_window_waits_for_other_ranks_and_most_products_are_in_one() -> None:
    """So a slow rank's own time is longer, and that of the ranks that wait for it is not."""
    shares = dict.fromkeys(("data", "recomputed", "selective", "pipeline"), 1.0)
    shares |= {"zero bubble": 0.5, "context": 0.3, "experts": 0.3, "tensor": 0.1, "tensor, recomputed": 0.1}
    bodies = {name: no_collective_is_within(LAYOUTS[name][0], least) for name, least in shares.items()}
    run_ranks(2, one_after_the_other(bodies), timeout=240)


def test_squares_are_those_of_the_documents() -> None:
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    masked = Batch(tokens, tokens, torch.tensor([[0, 1, 2, 0, 1, 0]]), torch.tensor([[0, 0, 0, 1, 1, 2]]))
    assert Amount.of(masked, context=1) == Amount(6, 9 + 4 + 1)
    assert Amount.of(Batch(tokens, tokens), context=2) == Amount(3, 18)
