"""Numbers under load become findings where the table knows what is usual; columns are those of nccl-tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from lockstep_trainer.health import nccltests
from lockstep_trainer.health.collectives import pairings
from lockstep_trainer.health.measured import Burn, Collective, bus_bandwidth, of_burns, of_collectives
from lockstep_trainer.health.readings import GpuReadings
from lockstep_trainer.health.table import load

TABLE = load()
H100 = "NVIDIA H100 80GB HBM3"
USUAL = {"matmul": 680.0, "copy": 2900.0, "h2d": 53.0, "d2h": 52.0}
# The form that nccl-tests' README shows: comments, three lines of headings, a row a size.
SAMPLE = """\
# nThread 1 nGpus 8 minBytes 1048576 maxBytes 33554432 step: 32(factor) warmup iters: 5 iters: 20 validation: 1
#
# Using devices
#  Rank  0 Group  0 Pid  42 on node device  0 [0x00] NVIDIA H100 80GB HBM3
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
     1048576        262144     float     sum      -1    38.21   27.44   48.02      0    37.90   27.67   48.42      0
    33554432       8388608     float     sum      -1    182.4  183.96  321.93    N/A    182.0  184.36  322.64    N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 185.252
"""


def burn(device: int = 0, rates: Mapping[str, float] | None = None) -> Burn:
    """A healthy one but for these rates."""
    return Burn(device, H100, {**USUAL, **(rates or {})}, rounds=100)


def test_usual_rates_are_no_finding() -> None:
    assert of_burns([burn(index) for index in range(8)], (), TABLE) == []


@pytest.mark.parametrize(("measure", "rate"), [("matmul", 300.0), ("copy", 1500.0), ("h2d", 12.0), ("d2h", 25.0)])
def test_a_gpu_far_below_its_model_is_too_slow(measure: str, rate: float) -> None:
    (finding,) = of_burns([burn(0, {measure: rate})], [GpuReadings(0, serial="1650")], TABLE)
    assert (finding.kind, finding.severity, finding.serial) == ("burnin.too-slow", "fatal", "1650")
    assert f"{rate:.1f}" in finding.evidence


def test_a_gpu_slower_than_the_others_of_its_node_is_named() -> None:
    (finding,) = of_burns([burn(0), burn(1), burn(2, {"matmul": 580.0}), burn(3)], (), TABLE)
    assert (finding.kind, finding.severity, finding.gpu) == ("burnin.slower-than-others", "warn", 2)


def test_two_gpus_are_too_few_to_say_which_one_is_unusual() -> None:
    assert of_burns([burn(0), burn(1, {"matmul": 580.0})], (), TABLE) == []


def test_a_product_that_changes_is_fatal_on_any_device() -> None:
    (finding,) = of_burns([Burn(0, "cpu", {"matmul": 0.01}, rounds=100, unequal=1)], (), TABLE)
    assert (finding.kind, finding.severity) == ("burnin.unequal", "fatal")


def test_a_cpu_is_only_measured() -> None:
    assert of_burns([Burn(index, "cpu", {"matmul": 0.01 * (index + 1)}) for index in range(4)], (), TABLE) == []


def test_a_burn_in_that_fails_names_the_gpu() -> None:
    (finding,) = of_burns([Burn(3, "", error="exit code -6: CUDA error")], (), TABLE)
    assert (finding.kind, finding.gpu) == ("burnin.failed", 3)
    assert "CUDA error" in finding.evidence


@pytest.mark.parametrize(
    ("operation", "busbw"), [("all_reduce", 175.0), ("all_gather", 87.5), ("reduce_scatter", 87.5), ("sendrecv", 100.0)]
)
def test_bandwidths_are_those_of_nccl_tests(operation: str, busbw: float) -> None:
    """8 ranks, 10^8 bytes in 1 ms."""
    assert bus_bandwidth(operation, 8, 100_000_000, 1000.0) == pytest.approx((100.0, busbw))


def test_the_columns_of_nccl_tests_agree_with_our_formula() -> None:
    for row in nccltests.parse("all_reduce", 8, SAMPLE):
        ours = bus_bandwidth(row.operation, 8, row.size, row.time_us)
        assert ours == pytest.approx((row.algbw, row.busbw), rel=1e-3)


def test_the_output_of_nccl_tests_is_read() -> None:
    first, second = nccltests.parse("all_reduce", 8, SAMPLE)
    assert first == Collective("all_reduce", "0-7", 1048576, 262144, "float", "sum", 38.21, 27.44, 48.02, 0)
    assert (second.size, second.wrong) == (33554432, 0)
    assert nccltests.parse("all_reduce", 8, "Test NCCL failure common.cu:1279 'unhandled cuda error'") == []


@pytest.mark.parametrize("ranks", [2, 3, 7, 8])
def test_every_two_ranks_meet_once_and_nobody_twice_in_a_round(ranks: int) -> None:
    rounds = list(pairings(ranks))
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(ranks) for b in range(a + 1, ranks)]
    for pairs in rounds:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy))


def row(**changes: object) -> Collective:
    """An all-reduce of a node's eight GPUs."""
    usual = Collective("all_reduce", "0-7", 1 << 30, 1 << 28, "float", "sum", 4000.0, 270.0, 470.0)
    return replace(usual, **changes)  # type: ignore[arg-type]


def test_collectives_that_fail_or_err_or_crawl_are_found() -> None:
    def kinds(*rows: Collective, model: str = H100) -> list[str]:
        return [finding.kind for finding in of_collectives(rows, model, TABLE)]

    assert kinds(row()) == []
    assert kinds(row(busbw=300.0)) == ["collectives.too-slow"]
    assert kinds(row(size=1 << 20, busbw=20.0), row()) == []  # small ones are bound by latency
    assert kinds(row(busbw=300.0), model="cpu") == []
    assert kinds(row(busbw=300.0, ranks="0-3")) == []  # the table knows eight
    assert kinds(row(wrong=3)) == ["collectives.wrong"]
    assert kinds(row(error="no end within 120 s")) == ["collectives.failed"]
