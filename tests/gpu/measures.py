"""What the search for slow ranks and for wrong numbers measures, on a GPU: whether it says what is so, how much it
differs from one time to the next, and what it costs a step. Each part is tried whether the others fail or not."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu.notes import keep
from gpu.ranks import alone, first_of
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.batch import Batch
from lockstep_trainer.health.classify import classify
from lockstep_trainer.health.load import burn_in
from lockstep_trainer.health.measured import of_burns
from lockstep_trainer.health.nvml import Refused, read_gpus
from lockstep_trainer.health.preflight import open_nvml
from lockstep_trainer.health.readings import Readings
from lockstep_trainer.health.table import load
from lockstep_trainer.loss import Loss
from lockstep_trainer.measuring.clockrate import ClockRate, asking
from lockstep_trainer.measuring.clocks import DeviceClock, clock_of
from lockstep_trainer.measuring.hostpauses import HostPauses
from lockstep_trainer.measuring.ownwork import OwnWork
from lockstep_trainer.measuring.waits import Waits
from lockstep_trainer.measuring.workmeter import WorkMeter
from lockstep_trainer.measuring.yardstick import EVERY, Yardstick
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.optim.build import build_optimizer, start_fresh
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.gradients import clip, squares
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize
from lockstep_trainer.parallel.sharded import local_shard
from lockstep_trainer.replay.ring import Disagreement, Ring
from lockstep_trainer.replay.sampling import Sampling
from lockstep_trainer.runtime import make_deterministic, refusing, set_allocator
from lockstep_trainer.steprecord import OwnStep
from lockstep_trainer.stragglers.settings import Settings

GPU = torch.device("cuda", 0)
LARGE = DecoderConfig(dim=2048, layers=8, heads=16, kv_heads=8, ffn_dim=5632, vocab_size=32768)
SMALL = DecoderConfig(dim=512, layers=4, heads=8, kv_heads=4, ffn_dim=1408, vocab_size=8192)
"""Its kernels are short: the GPU waits for its host."""
CASES = {"large, compiled": (LARGE, 4096, True), "small, eager": (SMALL, 1024, False)}
SAMPLES = 2
TURNS = 50
"""Of the yardstick."""
BLOCK, ROUNDS = 2 * EVERY, 4
"""Steps that are timed together, with two turns of the yardstick where there is one; and how often by turns."""
SLOWER = 0.3
BURN_SECONDS = 4.0


def run(folder: Path) -> dict[str, Any]:
    """Numbers by part."""
    set_allocator(GPU)
    make_deterministic()
    alone(GPU)
    found: dict[str, Any] = {}
    wrong: list[str] = []

    def attempt(name: str, part: Callable[[dict[str, Any]], None]) -> None:
        begun = time.perf_counter()
        found[name] = {}
        try:
            part(found[name])
        except TimeoutError:
            raise
        except Exception as error:
            traceback.print_exc()
            found[name]["error"] = f"{type(error).__name__}: {str(error)[:400]}"
            wrong.append(name)
        found[name]["took_s"] = round(time.perf_counter() - begun, 1)
        print(name, found[name], flush=True)
        keep(folder, "measures", found)

    attempt("driver", _driver)
    attempt("clock rate", _clock_rate)
    attempt("device clock", _device_clock)
    attempt("yardstick", _yardstick)
    for name, (config, length, compiled) in CASES.items():
        attempt(name, partial(_training, config, length, compiled))
        gc.collect()
        torch.cuda.empty_cache()
    attempt("burn-in", _burn_in)
    dist.destroy_process_group()
    attempt("waits", _waits)
    assert not wrong, {name: found[name]["error"] for name in wrong}
    return found


# --- the driver -------------------------------------------------------------------------------------------------------


def _driver(found: dict[str, Any]) -> None:
    nvml = open_nvml(os.environ)
    assert not isinstance(nvml, str), f"there is no NVML: {nvml}"
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        gpus = read_gpus(nvml)
        seconds.append(time.perf_counter() - begun)
    found["read_ms"] = _spread(seconds, 1e3)
    reading = dataclasses.asdict(gpus[0])
    found["unanswered"] = gpus[0].unanswered
    found["without_an_answer"] = sorted(name for name, value in reading.items() if value is None)
    found["findings"] = [str(finding) for finding in classify(Readings(gpus=gpus), load())]
    try:
        with nvml.listen() as events:
            found["xids"] = [dataclasses.asdict(xid) for xid in events.heard()]
    except Refused as refused:
        found["xids"] = refused.code
    assert len(gpus) == torch.cuda.device_count()
    assert gpus[0].uuid, "the GPU does not tell its UUID"
    assert not gpus[0].lost, gpus[0].lost
    assert not gpus[0].unanswered, gpus[0].unanswered


def _clock_rate(found: dict[str, Any]) -> None:
    """Idle and beside a load, and how long an answer takes meanwhile."""
    rate = ClockRate.of(GPU)
    assert rate is not None
    rate.begin()
    try:
        until = time.perf_counter() + 5
        while rate.newest() is None and time.perf_counter() < until:
            time.sleep(0.05)
        found["idle_mhz"] = rate.newest()
        matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device=GPU)
        ask = asking(lambda: open_nvml(os.environ), str(torch.cuda.get_device_properties(GPU).uuid))
        ask()  # opens NVML
        seconds = []
        until = time.perf_counter() + 2.5
        while time.perf_counter() < until:
            for _ in range(50):
                torch.mm(matrix, matrix)
            begun = time.perf_counter()
            found["loaded_mhz"] = ask()
            seconds.append(time.perf_counter() - begun)
            torch.cuda.synchronize()
        found["newest_mhz"] = rate.newest()
        found["answer_ms"] = _spread(seconds, 1e3)
    finally:
        rate.close()
    assert found["idle_mhz"] is not None, "the driver tells no clock of the GPU that torch uses"
    assert found["newest_mhz"] is not None, "the driver no longer answers"
    assert 200 < found["loaded_mhz"] < 3000


# --- the clocks -------------------------------------------------------------------------------------------------------


def _device_clock(found: dict[str, Any]) -> None:
    """Beside events of torch's own: the same time, nothing waited for, events used again."""
    clock = DeviceClock()
    cycles = int(2_000_000 * 0.01 / _spun(clock, 2_000_000))  # some 10 ms
    errors, host, asked = [], [], []
    for number in range(30):
        begun = time.perf_counter()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        mark = clock.mark()
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        clock.add(mark, clock.mark())
        last.record()
        host.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        early = clock.take()
        asked.append(time.perf_counter() - begun)
        torch.cuda.synchronize()
        right = first.elapsed_time(last) / 1000
        measured = clock.take()
        errors.append(measured / right - 1)
        if number:
            assert early == 0, "it has counted what the device had not done"
            assert len(clock._free) == 2, "events are not used again"
    found["error"] = _spread(errors, 1)
    found["host_us"] = _spread(host, 1e6)
    found["take_us"] = _spread(asked, 1e6)
    assert max(map(abs, errors)) < 0.02
    assert statistics.median(host) < 0.005, "the host waits for the device"


def _spun(clock: DeviceClock, cycles: int) -> float:
    """Seconds of so many cycles."""
    seconds = 0.0
    for _ in range(2):  # the first one loads the kernel
        mark = clock.mark()
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        clock.add(mark, clock.mark())
        torch.cuda.synchronize()
        seconds = clock.take()
    return seconds


def _yardstick(found: dict[str, Any]) -> None:
    """Behind other work, as after a step, and on a GPU that has nothing to do: both say the same."""
    yardstick = Yardstick(GPU)
    for name, cycles in {"behind work": 10_000_000, "on an idle GPU": 0}.items():
        products, copies, host, device = [], [], [], []
        for number in range(TURNS + 5):
            torch.cuda.synchronize()
            if cycles:
                torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            begun = time.perf_counter()
            yardstick.measure()
            took = time.perf_counter() - begun
            last.record()
            early = yardstick.take()
            torch.cuda.synchronize()
            told = yardstick.take() or early
            assert told is not None
            assert not (cycles and early), "it has told what the device had not done"
            if number >= 5:
                products.append(told[0])
                copies.append(told[1])
                host.append(took)
                device.append(first.elapsed_time(last) / 1000)
        product, copy = statistics.median(products), statistics.median(copies)
        found[name] = {
            "product_us": _spread(products, 1e6),
            "copy_us": _spread(copies, 1e6),
            "product_tflops": round(2 * 2048**3 / product / 1e12, 1),
            "copy_gb_s": round(2 * 2 * 2**25 / copy / 1e9),
            "turn_host_us": _spread(host, 1e6),
            "turn_device_us": _spread(device, 1e6),
        }
    busy = found["behind work"]
    assert 100 < busy["product_tflops"] < 2000
    assert 500 < busy["copy_gb_s"] < 10000
    for what in ("product_us", "copy_us"):
        low, middle, high = (busy[what][each] for each in ("p10", "median", "p90"))
        assert high - low < Settings().threshold * middle, f"{what}: {busy[what]}"
        idle = found["on an idle GPU"][what]["median"]
        assert abs(idle / middle - 1) < Settings().threshold / 2, f"{what}: {idle} µs where there was nothing to do"


# --- a step -----------------------------------------------------------------------------------------------------------


class _Training:
    """The training loop's use of the measures, without data."""

    def __init__(self, config: DecoderConfig, length: int, *, compiled: bool) -> None:
        layout = Layout()
        meshes = Meshes.build(layout, GPU)
        backend = "inductor" if compiled else None
        parts = build_parts(config, layout, meshes, device=GPU, precision="bf16", compile_backend=backend)
        initialize(parts, seed=0)
        loss = Loss(compiler=backend)
        self.engine = Engine(parts, layout, meshes, loss, micro_batch_size=SAMPLES, device=GPU, dtype=torch.bfloat16)
        self.named = list(self.engine.named_parameters())
        self.optimizer = build_optimizer(self.named, OptimizerSpec(lr=1e-5))
        start_fresh(self.optimizer)
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, config.vocab_size, (SAMPLES, length + 1), generator=random)
        self.host_batch = Batch(tokens[:, :-1], tokens[:, 1:])
        self.batch = self.host_batch.to(GPU)
        self.compiled = compiled
        self.work: WorkMeter | None = None
        self.own: OwnWork | None = None
        self.ring: Ring | None = None
        self.replays = False
        self.steps = 0

    def measure(self) -> None:
        """From now on, as ``WorkMeter.of`` does it."""
        host = HostPauses()
        self.own = OwnWork.of(self.engine, compiled=self.compiled, recomputed=False, stood=host.seconds)
        clock = partial(clock_of, GPU, host.seconds)
        waits = Waits.of(self.engine, self.own, compiled=self.compiled, clock=clock)
        rate = ClockRate.of(GPU)
        self.work = WorkMeter(self.own, GPU, waits=waits, host=host, rate=rate, local_step=True)
        self.work.begin()

    def gradients(self) -> list[torch.Tensor]:
        """Of the batch."""
        self._forward_backward()
        found = [local_shard(parameter.grad).clone() for _, parameter in self.named if parameter.grad is not None]
        self.optimizer.zero_grad()
        return found

    def step(self) -> OwnStep | None:
        """As the training loop has it: the host waits for the loss, and for nothing behind it."""
        self.steps += 1
        if self.work:
            self.work.batch(self.host_batch)
        sums = self._forward_backward()
        norm = squares(self.named, self.engine.layout, self.engine.second_copies)
        loss, square = torch.stack([sums[0], norm]).tolist()
        assert math.isfinite(loss)
        clip(self.named, square**0.5, 1.0)
        with self.work.optimizer() if self.work else nullcontext():
            self.optimizer.step()
        self.optimizer.zero_grad()
        told = self.work.take() if self.work else None
        if self.work and self.work.device_due(self.steps):
            self.work.measure_device()
        return told

    def _forward_backward(self) -> torch.Tensor:
        windows = self.work.windows(measured=not self.replays) if self.work else nullcontext()
        with refusing(True), windows:
            if self.ring and self.replays:
                return self.ring.forward_backward(self.steps, self.batch, self.batch.tokens)
            return self.engine.forward_backward(self.batch, self.batch.tokens)

    def block(self) -> tuple[float, list[OwnStep]]:
        """Seconds of a step, and what was told of some."""
        torch.cuda.synchronize()
        begun = time.perf_counter()
        told = [self.step() for _ in range(BLOCK)]
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / BLOCK, [each for each in told if each is not None]

    def close(self) -> None:
        if self.work:
            self.work.close()


def _training(config: DecoderConfig, length: int, compiled: bool, found: dict[str, Any]) -> None:
    plain, measured = (_Training(config, length, compiled=compiled) for _ in range(2))
    right = plain.gradients()
    measured.measure()
    try:
        again = measured.gradients()
        assert all(torch.equal(a, b) for a, b in zip(right, again, strict=True)), "windows change gradients"
        _own_work(plain, measured, found)
        _dragged(measured, found)
        _replayed(plain, right, found)
    finally:
        measured.close()


def _own_work(plain: _Training, measured: _Training, found: dict[str, Any]) -> None:
    for side in (plain, measured):
        side.block()
    assert measured.own is not None
    clock = measured.own.clock
    assert isinstance(clock, DeviceClock)
    kept = len(clock._free) + 2 * len(clock._pairs)
    seconds: dict[str, list[float]] = {"plain": [], "measured": []}
    told: list[OwnStep] = []
    for _ in range(ROUNDS):
        seconds["plain"].append(plain.block()[0])
        took, steps = measured.block()
        seconds["measured"].append(took)
        told += steps
    without, with_them = (statistics.median(each) for each in seconds.values())
    own = [step.compute for step in told]
    found["step_ms"] = {name: _spread(each, 1e3) for name, each in seconds.items()}
    found["cost_of_a_step"] = round(with_them / without - 1, 4)
    found["own_ms"] = _spread(own, 1e3)
    found["own_share"] = round(statistics.median(own) / with_them, 3)
    found["product_us"] = _spread([step.product for step in told if step.product], 1e6)
    found["copy_us"] = _spread([step.copy for step in told if step.copy], 1e6)
    found["clock_mhz"] = _spread([step.clock for step in told if step.clock], 1)
    found["host_ms"] = _spread([step.host for step in told], 1e3)
    found["events"] = [kept, len(clock._free) + 2 * len(clock._pairs)]
    assert len(told) == ROUNDS * BLOCK
    assert 0.3 < found["own_share"] < 1.02, "a single rank has nothing to wait for"
    # What the first turn of a block finds is told in the block; that of the last step may come with the next one.
    assert sum(step.product is not None for step in told) >= ROUNDS * BLOCK // EVERY - 1
    assert abs(found["events"][1] - kept) <= 4, "events are not used again"
    assert all(step.waited == {} for step in told)


def _dragged(measured: _Training, found: dict[str, Any]) -> None:
    """Slower on purpose: by as much as asked for."""
    assert measured.work is not None
    plain = measured.block()[1]
    measured.work.drag(SLOWER)
    measured.block()
    slow = measured.block()[1]
    compute = [statistics.median(step.compute for step in each) for each in (plain, slow)]
    product = [statistics.median(step.product for step in each if step.product) for each in (plain, slow)]
    found["dragged"] = {
        "asked": SLOWER,
        "own": round(compute[1] / compute[0] - 1, 3),
        "product": round(product[1] / product[0] - 1, 3),
    }
    if measured.compiled:  # where the GPU waits for its host, it is not certain by how much
        assert 0.2 < found["dragged"]["own"] < 0.4, found["dragged"]
        assert found["dragged"]["product"] > 0.1, found["dragged"]


def _replayed(plain: _Training, right: Sequence[torch.Tensor], found: dict[str, Any]) -> None:
    """Each step is computed twice and compared: nothing differs, and what is left behind are the same bits as from the
    engine alone. ``right``: gradients of a fresh model."""
    told: list[Disagreement] = []
    initialize(plain.engine.parts, seed=0)  # type: ignore[arg-type]  # they are decoders
    control = dist.new_group(backend="gloo")
    hooked = {}
    before = statistics.median(plain.block()[0] for _ in range(2))
    plain.ring = Ring(plain.engine, control, sampling=Sampling(0, 1.0), compiled=plain.compiled, report=told.append)
    plain.block()
    hooked["hooks alone"] = statistics.median(plain.block()[0] for _ in range(2))
    plain.replays = True
    plain.block()
    hooked["replayed"] = statistics.median(plain.block()[0] for _ in range(2))
    found["replay"] = {name: round(seconds / before, 3) for name, seconds in hooked.items()}
    found["replay"]["points"] = len(plain.ring._points)
    found["replay"]["disagreements"] = [str(each)[:400] for each in told[:3]]
    initialize(plain.engine.parts, seed=0)  # type: ignore[arg-type]
    again = plain.gradients()
    assert plain.ring.agreed is not None
    assert not told, f"{len(told)} steps did not repeat: {told[0]}"
    assert all(torch.equal(a, b) for a, b in zip(right, again, strict=True)), "a replayed step leaves other gradients"


# --- others -----------------------------------------------------------------------------------------------------------


def _burn_in(found: dict[str, Any]) -> None:
    (burn,) = burn_in(1, BURN_SECONDS)
    found |= dataclasses.asdict(burn)
    nvml = open_nvml(os.environ)
    gpus = () if isinstance(nvml, str) else read_gpus(nvml)
    found["findings"] = [str(each) for each in of_burns([burn], gpus, load())]
    assert not burn.error, burn.error
    assert burn.rounds > 0
    assert not burn.unequal, f"{burn.unequal} of {burn.rounds} products differ from the first"


def _waits(found: dict[str, Any]) -> None:
    """On rank 0 of eight of which no other exists: that the marks are where events can be recorded, and that nothing is
    longer than the step."""
    layouts = {"data": Layout(shard=8), "tensor": Layout(shard=2, tensor=4), "context": Layout(shard=2, context=4)}
    for name, layout in layouts.items():
        first_of(layout.world_size, GPU)
        meshes = Meshes.build(layout, GPU, timeout=timedelta(seconds=60))
        parts = build_parts(SMALL, layout, meshes, device=GPU, precision="bf16")
        initialize(parts, seed=0)
        group = meshes.tensor.get_group() if layout.tensor > 1 else None
        engine = Engine(parts, layout, meshes, Loss(0.0, group), micro_batch_size=SAMPLES, device=GPU)
        own = OwnWork.of(engine, compiled=False, recomputed=False)
        waits = Waits.of(engine, own, compiled=False, clock=partial(clock_of, GPU))
        tokens = torch.randint(0, SMALL.vocab_size, (SAMPLES, 1025), device=GPU)
        batch = Batch(tokens[:, :-1], tokens[:, 1:])
        for _ in range(4):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            with own.step(), waits.step():
                engine.forward_backward(batch, SAMPLES * 1024)
            torch.cuda.synchronize()
            took, waited, computed = time.perf_counter() - begun, waits.take(), own.take()
            for _, parameter in engine.named_parameters():
                parameter.grad = None
        found[name] = {"step_ms": round(1e3 * took, 2), "own_ms": round(1e3 * (computed or 0), 2)}
        found[name] |= {f"{dimension}_ms": round(1e3 * seconds, 3) for dimension, seconds in waited.items()}
        dist.destroy_process_group()
        assert name in waited, waited
        assert all(0 <= seconds < took for seconds in waited.values()), waited
        assert computed is not None
        assert 0 < computed < took
        assert waited[name] > 0, "nothing was measured"


def _spread(values: Sequence[float], unit: float) -> dict[str, float]:
    """What lies in the middle, and between which two numbers eight of ten are."""
    if not values:
        return {}
    ordered = sorted(value * unit for value in values)
    at = len(ordered) - 1
    return {
        "p10": _rounded(ordered[at // 10]),
        "median": _rounded(statistics.median(ordered)),
        "p90": _rounded(ordered[at - at // 10]),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
