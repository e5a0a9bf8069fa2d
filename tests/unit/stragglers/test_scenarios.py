"""The scenarios of slow ranks are what they say they are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lockstep_trainer.stragglers.work import Cause, Probe
from stragglers.scenarios.catalogue import KINDS, scenario
from stragglers.scenarios.faults import Course, Fault
from stragglers.scenarios.layout import Layout
from stragglers.scenarios.noise import Job
from stragglers.scenarios.physics import Transfers
from stragglers.scenarios.scenario import Restart, Scenario, Step
from stragglers.scenarios.strength import fitted, strength

JOB = Job(Layout(4), compute=1.0, host=0.02, batch=0.01, transfers=Transfers(0.2, 0.0, 0.0))


def first(found: Scenario, count: int) -> list[Step]:
    """Steps of it."""
    return [item for item in itertools.islice(found.run(), count) if isinstance(item, Step)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_scenario_names_ranks_that_it_has_and_lasts_long_enough_to_find_them(kind: str) -> None:
    found = scenario(kind, 1)
    ranks = max(generation.layout.size for generation in found.generations)
    assert len(found.places) == found.generations[0].layout.size
    assert {place.rank for place in found.places} == set(range(len(found.places)))
    for expected in found.expected:
        assert all(rank < ranks for rank in expected.ranks)
        assert expected.begins <= expected.onset <= found.steps - 100
        assert expected.ends is None or expected.ends - expected.onset >= 40
    works = first(found, 1)[0].work
    assert [work.rank for work in works] == list(range(len(found.places)))


def test_a_scenario_is_the_same_each_time() -> None:
    one, other = scenario("clock", 3), scenario("clock", 3)
    assert one == other
    assert first(one, 5) == first(other, 5)
    assert one != scenario("clock", 4)


def test_what_a_rank_tells_adds_up_to_the_step() -> None:
    for kind in ("clock", "heavy-head", "two"):
        for step in first(scenario(kind, 2), 3):
            for work in step.work:
                assert work.compute + work.data + work.host + sum(work.waited.values()) == pytest.approx(step.seconds)


def test_slowness_is_measured_by_own_work_and_by_the_step() -> None:
    found = strength(JOB, Fault(Cause.COMPUTE, 0.3, units=(2,)), (2,))
    assert found.own == pytest.approx(0.3 / 1.03)
    assert found.step == pytest.approx(0.3 / 1.23)
    assert strength(JOB, Fault(Cause.NETWORK, 0.3, units=(2,)), (2,)).least == pytest.approx(0.06 / 1.23)


def test_slowness_is_the_same_however_much_documents_differ() -> None:
    fault = Fault(Cause.COMPUTE, 0.3, units=(2,))
    varied = replace(JOB, vary_squares=0.7, vary_tokens=0.1)
    assert strength(varied, fault, (2,)) == strength(JOB, fault, (2,))


def test_a_fault_is_fitted_to_the_measure_that_sees_less_or_more_of_it() -> None:
    fault = Fault(Cause.HOST, 1.0, units=(1,))
    small, large = fitted(JOB, fault, (1,), most=0.2), fitted(JOB, fault, (1,), least=0.2)
    assert small is not None
    assert large is not None
    assert strength(JOB, small, (1,)).own == pytest.approx(0.2, rel=0.01)
    assert strength(JOB, large, (1,)).step == pytest.approx(0.2, rel=0.01)


def test_a_link_that_no_transfer_needs_cannot_be_slow() -> None:
    job = Job(Layout(4), compute=1.0, host=0.02, batch=0.01, transfers=Transfers(0.0, 0.0, 0.0))
    assert fitted(job, Fault(Cause.NETWORK, 1.0, units=(1,)), (1,), least=0.1) is None


@pytest.mark.parametrize(
    ("course", "levels"),
    [
        (Course(2), [0, 0, 1, 1, 1, 1]),
        (Course(2, ends=4), [0, 0, 1, 1, 0, 0]),
        (Course(1, full=5), [0, 0.25, 0.5, 0.75, 1, 1]),
        (Course(1, on=2, off=1), [0, 1, 1, 0, 1, 1]),
    ],
)
def test_slowness_takes_its_course(course: Course, levels: list[float]) -> None:
    np.testing.assert_allclose(course.at(np.arange(6)), levels)


@pytest.mark.parametrize(
    ("kind", "slow"), [("clock", "compute"), ("compute", "compute"), ("memory", "memory"), ("host", None)]
)
def test_the_probe_of_the_part_that_is_slow_is_slow_and_no_other(kind: str, slow: str | None) -> None:
    found = scenario(kind, 1)
    (expected,), size = found.expected, found.faults[0].size
    (rank,) = expected.ranks
    others = [place.rank for place in found.places if place.rank != rank]
    for probed in ("compute", "memory"):
        answer = found.answer(Probe(probed, ranks=(rank, *others)), expected.onset + 1).ranks
        ratio = answer[rank] / float(np.median([answer[other] for other in others]))
        assert ratio > 1 + 0.7 * size if probed == slow else ratio == pytest.approx(1, abs=0.06)


def test_transfers_with_the_slow_link_are_slow_once_it_is() -> None:
    found = scenario("link", 1)
    (rank,) = found.expected[0].ranks
    begins = found.expected[0].begins
    assert begins > 0
    other, *_ = (place.rank for place in found.places if place.rank != rank)
    pair = (rank, other)
    before = found.answer(Probe("link", pairs=(pair,)), begins - 1).pairs[pair]
    after = found.answer(Probe("link", pairs=(pair,)), begins).pairs[pair]
    assert after / before == pytest.approx(1 + found.faults[0].size, rel=0.1)


def test_a_rank_that_recovers_works_longer_than_its_peers_in_between_and_not_before_or_after() -> None:
    found = scenario("recovers", 1)
    (expected,) = found.expected
    (rank,) = expected.ranks
    steps = [item for item in found.run() if isinstance(item, Step)]

    def beside_the_others(part: list[Step]) -> float:
        own = np.array([[work.compute + work.data + work.host for work in step.work] for step in part])
        peers = [p.rank for p in found.places if p.rank != rank and p.pipeline == found.places[rank].pipeline]
        return float(np.median(own[:, rank] / np.median(own[:, peers], axis=1)))

    assert expected.ends is not None
    before = beside_the_others(steps[: expected.begins])
    during = beside_the_others(steps[expected.onset : expected.ends])
    after = beside_the_others(steps[expected.ends :])
    assert during / before > 1 + 1.1 * found.threshold
    assert after / before == pytest.approx(1, abs=0.04)


def test_after_a_restart_on_other_nodes_the_slow_device_has_another_rank() -> None:
    found = scenario("restart-moved", 1)
    items = list(found.run())
    (restart,) = [item for item in items if isinstance(item, Restart)]
    one, other = (min(expected.ranks) for expected in found.expected)
    assert one != other
    assert found.places[one].node == restart.places[other].node


def test_steps_after_a_restart_begin_again_where_the_checkpoint_was() -> None:
    found = scenario("restart-same", 1)
    numbers = [item.number for item in found.run() if isinstance(item, Step)]
    assert len(numbers) == found.steps
    before = found.generations[0].steps
    assert numbers[before] <= numbers[before - 1] + 1


def test_where_no_clock_is_known_none_is_told() -> None:
    found = next(each for each in (scenario("clock", seed) for seed in range(20)) if each.clocks == 0)
    assert {work.clock for work in first(found, 1)[0].work} == {None}
    assert found.expected[0].causes == {Cause.CLOCK, Cause.COMPUTE}
