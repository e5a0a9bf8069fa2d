"""Ring replay on real ranks: training leaves the same bits with it as without; a flipped bit is found and its rank
named, and the step that it spoiled is computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from corruption.setting import MIXTURE, Setting, batch_of, build, on_ranks
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.batch import Batch
from lockstep_trainer.errors import UserError
from lockstep_trainer.injection.bitflips import Fault, Injector, Site, flip_bit
from lockstep_trainer.optim.adamw import Pairs
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.expert import update_balance
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.sharded import local_shard
from lockstep_trainer.replay.compare import Verdict
from lockstep_trainer.replay.report import Replay
from lockstep_trainer.replay.ring import Disagreement, Ring
from lockstep_trainer.replay.sampling import Sampling
from lockstep_trainer.replay.units import Units

pytestmark = pytest.mark.timeout(900)  # up to 40 s of four ranks' CPU, on a machine that may have other work

STEPS = 3
Update = Callable[[int, Pairs, torch.optim.Optimizer], AbstractContextManager[None]]


def train(setting: Setting, engine: Engine, compute: Callable[[int, Batch], Tensor], update: Update) -> str:
    """A fingerprint of all bits that training leaves on this rank: gradients of each step, parameters, the optimizer's
    state, buffers, sums and random state."""
    bits = hashlib.sha256()
    parameters = list(engine.named_parameters())
    optimizer = build_optimizer(parameters, OptimizerSpec(lr=3e-3, eps=1e-6))

    def add(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            bits.update(local_shard(tensor).detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    for step in range(1, STEPS + 1):
        add([compute(step, batch_of(step, setting, engine.meshes.rank))])
        add([parameter.grad for _, parameter in parameters if parameter.grad is not None])
        assert all(parameter.grad is not None for _, parameter in parameters)
        with update(step, parameters, optimizer):
            optimizer.step()
        optimizer.zero_grad()
        update_balance(engine.parts, engine.meshes)
    add([parameter for _, parameter in parameters])
    add([value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)])
    add([buffer.reshape(-1) for part in engine.parts for buffer in part.buffers()])
    add([torch.get_rng_state()])
    return bits.hexdigest()


def plainly(setting: Setting) -> str:
    """Training without replay."""
    engine = build(setting)
    replay = Replay(engine, None)
    return train(setting, engine, lambda step, batch: engine.forward_backward(batch, setting.tokens), replay.update)


def replayed(
    setting: Setting,
    faults: Sequence[Fault] = (),
    *,
    share: float = 1.0,
    from_step: int = 2,
    known: Callable[[Callable[[], Tensor]], Tensor] | None = None,
    doubted: tuple[str, ...] = (),
) -> tuple[str, list[Disagreement]]:
    """Training with replays, and what they found. The faults are there from a step on, and then ``known`` is what
    known numbers are computed by. ``doubted``: points."""
    engine = build(setting)
    injector = Injector(engine.parts, engine.meshes.rank) if faults else None
    heard: list[Disagreement] = []
    compiled = setting.compiler is not None
    ring = Ring(engine, None, sampling=Sampling(3, share), compiled=compiled, doubted=doubted, report=heard.append)
    replay = Replay(engine, ring, report=heard.append, doubted=doubted)
    if injector is not None:
        injector.replaying = lambda: ring.replaying

    def compute(step: int, batch: Batch) -> Tensor:
        if injector is not None and step == from_step:
            injector.arm(faults)
            ring.known.compute = known or ring.known.compute
        return replay.forward_backward(step, batch, setting.tokens)

    return train(setting, engine, compute, replay.update), heard


def pipelined(schedule: str, precision: str = "fp32") -> Setting:
    """Two pipeline ranks of one unit."""
    stages = 1 if schedule in ("GPipe", "1F1B") else 2
    layout = Layout(pipeline=2, schedule=schedule, stages_per_rank=stages)
    return Setting(layout, precision=precision, micro_batches=4)


SETTINGS: dict[str, Setting] = {
    "fsdp": Setting(Layout(shard=4)),
    "hsdp-bf16": Setting(Layout(replicate=2, shard=2), precision="bf16"),
    "tensor": Setting(Layout(shard=2, tensor=2)),
    "context": Setting(Layout(shard=2, context=2)),
    "experts": Setting(Layout(shard=4, expert=2), MIXTURE),
    "pipeline": Setting(Layout(shard=2, pipeline=2), micro_batches=4),
    "pipeline-InterleavedZeroBubble": pipelined("InterleavedZeroBubble"),
    "pipeline-ZBVZeroBubble": pipelined("ZBVZeroBubble", "bf16"),
    "compiled": Setting(Layout(shard=2), compiler="aot_eager"),
    "compiled-InterleavedZeroBubble": replace(pipelined("InterleavedZeroBubble"), compiler="aot_eager"),
    "one-unit": Setting(Layout(tensor=2), recompute="selective"),
    "own": Setting(Layout(shard=3), own=True, micro_batches=1),
}
MORE_SETTINGS: dict[str, Setting] = {
    "fsdp-bf16": Setting(Layout(shard=4), precision="bf16"),
    "fsdp-selective": Setting(Layout(shard=4), recompute="selective"),
    "fsdp-full-one-micro-batch": Setting(Layout(shard=4), recompute="full", micro_batches=1),
    "replicate": Setting(Layout(replicate=3), micro_batches=1),
    "tensor-bf16-selective": Setting(Layout(shard=2, tensor=2), precision="bf16", recompute="selective"),
    "ulysses": Setting(Layout(shard=2, context=2, context_method="ulysses")),
    "experts-tensor": Setting(Layout(shard=2, tensor=2, expert=2), MIXTURE),
    "experts-pipeline": Setting(Layout(shard=2, pipeline=2, expert=2), MIXTURE, micro_batches=4),
    **{f"pipeline-{each}": pipelined(each) for each in ("GPipe", "Interleaved1F1B", "LoopedBFS", "DualPipeV")},
    "pipeline-tensor-ZBV": Setting(
        Layout(pipeline=2, tensor=2, schedule="ZBVZeroBubble", stages_per_rank=2), micro_batches=4
    ),
}
CASES = [*SETTINGS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_SETTINGS)]


@pytest.mark.parametrize("name", CASES)
def test_results_are_bitwise_untouched_and_no_unit_is_suspected(name: str, tmp_path: Path) -> None:
    setting = (SETTINGS | MORE_SETTINGS)[name]

    def body(rank: int) -> None:
        found, heard = replayed(setting)  # before the other: what is compiled first decides what its code may overwrite
        expected = plainly(setting)
        assert heard == []
        assert found == expected

    on_ranks(tmp_path, setting.layout.world_size, body)


SITES: dict[Site, tuple[str, str]] = {
    "product": ("blocks.1.attention.query", "forward"),
    "activation": ("blocks.1.ffn.down", "forward"),
    "inputGradient": ("blocks.1.ffn", "backward"),
    "gradient": ("blocks.1.attention.query.weight", "backward"),
    "weight": ("blocks.1.attention.query", "forward"),
}
BIT = 22  # of a float32: a mantissa's highest
CULPRIT = 2


def faults(**others: Any) -> list[Fault]:
    """One of each site, on the same rank."""
    return [Fault(CULPRIT, site, layer=1, bit=BIT, element=5, **others) for site in SITES]


def striking_once(fault: Fault) -> Fault:
    """The fault with a seed by which it strikes the first time that it can, and not again in these tests."""
    for seed in count():
        seeded = replace(fault, seed=seed)
        stream = seeded.stream()
        if [stream.random() < fault.rate for _ in range(8)] == [True, *7 * [False]]:
            return seeded
    raise AssertionError


def wrong_products(work: Callable[[], Tensor]) -> Tensor:
    """As a device computes them whose products are always wrong."""
    made = work()
    flip_bit(made, element=7, bit=BIT)
    return made


def _verdicts(heard: list[Disagreement]) -> list[Verdict]:
    return [verdict for each in heard if each.rejected for verdict in each.verdicts]


def test_with_three_units_a_fault_that_is_always_there_is_named_with_its_rank_and_place(tmp_path: Path) -> None:
    setting = Setting(Layout(shard=3), micro_batches=1)

    def body(rank: int) -> None:
        for fault in faults():
            _, heard = replayed(setting, [fault])
            runs = [(each.step, each.run, each.rejected) for each in heard]
            assert runs == [(2, 1, True), (2, 2, False), (3, 1, True), (3, 2, False)]
            for verdict in _verdicts(heard):
                assert (verdict.kind, verdict.ranks) == ("permanent", (CULPRIT,)), (fault, verdict)
                assert (verdict.point.name, verdict.point.phase) == SITES[fault.site]

    on_ranks(tmp_path, 3, body)


def test_it_is_named_in_the_first_step_of_a_generation_too(tmp_path: Path) -> None:
    """Calibration leaves out what nobody is to blame for; here somebody is."""
    setting = Setting(Layout(shard=3), micro_batches=1)

    def body(rank: int) -> None:
        _, heard = replayed(setting, faults()[:1], from_step=1)
        assert heard[0].calibration
        assert {(verdict.kind, verdict.ranks) for verdict in _verdicts(heard)} == {("permanent", (CULPRIT,))}
        assert {each.step for each in heard} == {1, 2, 3}

    on_ranks(tmp_path, 3, body)


def test_of_two_units_what_a_first_step_left_out_is_compared_where_it_is_doubted(tmp_path: Path) -> None:
    """Else nothing is that follows from it: what came to the same bits in one step may not in the next."""
    setting = TWO_UNITS["tensor"]
    product, activation = faults()[:2]
    point = "blocks.1.attention.query (forward, stage 0)"

    def body(rank: int) -> None:
        _, heard = replayed(setting, [product, activation], from_step=1)
        assert [(each.step, each.run, each.calibration) for each in heard] == [(1, 1, True)]
        assert str(heard[0].verdicts[0].point) == point
        _, heard = replayed(setting, [product, activation], from_step=1, doubted=(point,))
        assert {(each.step, each.calibration) for each in heard} == {(step, False) for step in (1, 2, 3)}
        assert {str(verdict.point) for verdict in _verdicts(heard)} == {point}
        elsewhere = "blocks.0.ffn (forward, stage 0)"
        _, heard = replayed(setting, [product], from_step=1, doubted=(elsewhere,))
        assert [(each.step, each.calibration) for each in heard] == [(1, True)]

    on_ranks(tmp_path, 4, body)


@pytest.mark.parametrize("when", ["step", "replay"])
def test_a_step_that_a_passing_fault_spoiled_is_computed_again_to_the_bits_of_a_clean_run(
    when: Literal["step", "replay"], tmp_path: Path
) -> None:
    setting = Setting(Layout(shard=3), micro_batches=1)

    def body(rank: int) -> None:
        expected = plainly(setting)
        for fault in faults(rate=0.4, when=when):
            found, heard = replayed(setting, [striking_once(fault)])
            assert [(each.step, each.run, each.rejected) for each in heard] == [(2, 1, True)]
            (verdict,) = heard[0].verdicts
            assert (verdict.kind, verdict.ranks) == ("intermittent", (CULPRIT,)), fault
            assert (verdict.point.name, verdict.point.phase) == SITES[fault.site]
            assert found == expected, fault

    on_ranks(tmp_path, 3, body)


TWO_UNITS = {
    "tensor": Setting(Layout(shard=2, tensor=2), micro_batches=1),
    "pipeline": Setting(Layout(shard=2, pipeline=2), micro_batches=2),
    "context": Setting(Layout(shard=2, context=2), micro_batches=1),
}


@pytest.mark.parametrize("name", ["tensor", "pipeline", pytest.param("context", marks=pytest.mark.slow)])
def test_with_two_units_a_passing_fault_names_its_rank_and_a_lasting_one_its_place_in_the_unit(
    name: str, tmp_path: Path
) -> None:
    setting = TWO_UNITS[name]
    units = Units(setting.layout)
    layer = 2 if name == "pipeline" else 1  # a layer of the culprit's stage

    def body(rank: int) -> None:
        expected = plainly(setting)
        for fault in faults(rate=0.4, when="step"):
            found, heard = replayed(setting, [striking_once(replace(fault, layer=layer))])
            (verdict,) = _verdicts(heard)
            assert (verdict.kind, verdict.ranks) == ("intermittent", (CULPRIT,)), (fault, verdict)
            assert found == expected
        for fault in faults():
            _, heard = replayed(setting, [replace(fault, layer=layer)])
            assert _verdicts(heard)
            for verdict in _verdicts(heard):
                assert verdict.kind == "undecided"
                assert set(verdict.ranks) == {CULPRIT, units.counterpart(CULPRIT, 1)}, (fault, verdict)

    on_ranks(tmp_path, 4, body)


def test_with_two_units_known_numbers_tell_who_is_always_wrong(tmp_path: Path) -> None:
    """The device's products are wrong, whatever it multiplies."""
    setting = TWO_UNITS["tensor"]

    def body(rank: int) -> None:
        _, heard = replayed(setting, faults()[:1], known=wrong_products if rank == CULPRIT else None)
        assert [(each.step, each.run, each.rejected) for each in heard] == [
            (2, 1, True), (2, 2, False), (3, 1, True), (3, 2, False),
        ]  # fmt: skip
        for verdict in _verdicts(heard):
            assert (verdict.kind, verdict.ranks, verdict.point.phase) == ("permanent", (CULPRIT,), "check")

    on_ranks(tmp_path, 4, body)


def test_one_unit_is_told_by_known_numbers_of_a_fault_that_it_repeats(tmp_path: Path) -> None:
    setting = Setting(Layout(tensor=2), micro_batches=1)
    bad = [replace(fault, rank=1) for fault in faults()[:1]]

    def body(rank: int) -> None:
        _, heard = replayed(setting, bad)
        assert heard == [], "by its own computation alone"
        _, heard = replayed(setting, bad, known=wrong_products if rank == 1 else None)
        found = [(each.step, each.rejected, each.verdicts[0].ranks) for each in heard]
        assert found == [(2, False, (1,)), (3, False, (1,))]

    on_ranks(tmp_path, 2, body)


def test_steps_that_are_not_sampled_are_computed_by_the_engine_alone(tmp_path: Path) -> None:
    setting = Setting(Layout(shard=2), micro_batches=1)

    def body(rank: int) -> None:
        _, heard = replayed(setting, [replace(fault, rank=1) for fault in faults()], share=0.0)
        assert heard == []

    on_ranks(tmp_path, 2, body)


def test_a_model_whose_computation_depends_on_its_data_is_refused(tmp_path: Path) -> None:
    setting = Setting(Layout(shard=2), own=True, micro_batches=1)

    def body(rank: int) -> None:
        engine = build(setting)
        ring = Ring(engine, None, sampling=Sampling(3, 1.0), compiled=False, report=lambda _: None)
        if rank == 1:
            engine.around = nullcontext  # type: ignore[assignment]  # this rank comes by no point at all
        with pytest.raises(UserError, match=r"resilience\.corruption"):
            ring.forward_backward(1, batch_of(1, setting, rank), setting.tokens)

    on_ranks(tmp_path, 2, body)
