"""A slow device or host is named with its cause, and nobody else is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lockstep_trainer.stragglers import settings
from lockstep_trainer.stragglers.hardware import Clock, Inquiry, cause
from lockstep_trainer.stragglers.settings import Settings
from lockstep_trainer.stragglers.work import Cause, Finding, Probe, Probed
from stragglers.plain import Change, Job, Slow, Step, places

ONSET = 60


def slower(rank: int, factor: float = 1.3, since: int = ONSET, until: int = 10**9, *, clock: bool = False) -> Change:
    def change(step: Step) -> None:
        if since <= step.number < until:
            step.compute[rank] *= factor
            if clock:
                step.clock[rank] /= factor

    return change


def when(job: Job) -> int:
    return next(number for number, one in job.said if isinstance(one, Finding))


@pytest.mark.parametrize(
    ("cause", "slow", "clock"),
    [
        (Cause.CLOCK, Slow(compute={3: 1.3}), True),
        (Cause.COMPUTE, Slow(compute={3: 1.3}), False),
        (Cause.MEMORY, Slow(memory={3: 1.5}), False),
    ],
)
def test_a_slow_device_is_named_with_its_cause_within_thirty_steps(cause: Cause, slow: Slow, clock: bool) -> None:
    job = Job(places(8))
    job.slow = slow
    job.play(ONSET + 60, slower(3, clock=clock))
    (finding,) = job.findings()
    assert (finding.cause, finding.ranks) == (cause, (3,))
    assert when(job) - ONSET <= 30
    assert abs(finding.since - ONSET) <= 3
    assert finding.slowdown == pytest.approx(0.3, abs=0.06)
    assert finding.cost == pytest.approx(0.3 / 1.4, abs=0.06)


def test_a_rank_slow_from_the_first_step_is_named() -> None:
    job = Job(places(8))
    job.slow = Slow(compute={3: 1.12})
    job.play(31, slower(3, 1.12, since=0))
    (finding,) = job.findings()
    assert finding.ranks == (3,)
    assert finding.since == settings.WARM  # the first step that is looked at


def test_a_late_host_is_named_when_its_device_is_fine() -> None:
    def change(step: Step) -> None:
        if step.number >= ONSET:
            step.host[2] += 0.2

    job = Job(places(8))
    job.play(ONSET + 40, change)
    (finding,) = job.findings()
    assert (finding.cause, finding.ranks) == (Cause.HOST, (2,))
    assert finding.slowdown == pytest.approx(0.2, abs=0.04)


def test_a_rank_that_saves_now_and_then_has_no_late_host() -> None:
    def change(step: Step) -> None:
        if step.number % 8 == 0:
            step.host[0] += 1

    job = Job(places(8))
    job.play(300, change)
    assert not job.findings()


def test_what_no_probe_confirms_is_no_finding_and_is_asked_less_and_less() -> None:
    job = Job(places(8))
    job.play(ONSET + 600, slower(3))
    assert not job.findings()
    asked = [number for number, one in job.said if isinstance(one, Probe) and one.kind == "compute"]
    gaps = np.diff(sorted(set(asked)))
    assert len(gaps) >= 2
    assert all(later >= 1.5 * earlier for earlier, later in itertools.pairwise(gaps))


def test_a_burst_that_ends_by_itself_is_neither_probed_nor_found() -> None:
    job = Job(places(8))
    job.slow = Slow(compute={3: 3.0})
    job.play(ONSET + 60, slower(3, 3.0, until=ONSET + 12))
    assert not job.findings()
    assert not job.probes()


def test_steps_that_are_long_for_all_accuse_nobody() -> None:
    def change(step: Step) -> None:
        if step.number % 20 >= 15:
            step.compute *= 2

    job = Job(places(8))
    job.play(200, change)
    assert not job.findings()
    assert not job.probes()


def test_thousands_of_clean_steps_with_outliers_accuse_nobody() -> None:
    spikes = np.random.default_rng(1)

    def change(step: Step) -> None:
        step.compute *= 1 + (spikes.random(8) < 0.01) * spikes.pareto(1.5, 8)

    job = Job(places(8), noise=0.03)
    job.play(2500, change)
    assert not job.findings()


def test_of_two_ranks_the_slower_one_is_named() -> None:
    job = Job(places(2, per_node=1))
    job.slow = Slow(compute={1: 1.2})
    job.play(ONSET + 30, slower(1, 1.2))
    assert [(one.cause, one.ranks) for one in job.findings()] == [(Cause.COMPUTE, (1,))]


def test_a_rank_alone_in_its_job_is_compared_with_its_own_past() -> None:
    job = Job(places(1))
    job.play(ONSET)  # its probe when it was well
    job.slow = Slow(compute={0: 1.3})
    job.play(40, slower(0))
    assert [(one.cause, one.ranks) for one in job.findings()] == [(Cause.COMPUTE, (0,))]


def test_a_late_host_alone_in_its_job_stays_found_for_as_long_as_it_is_late() -> None:
    def change(step: Step) -> None:
        if step.number >= ONSET:
            step.host[0] += 0.2

    job = Job(places(1))
    job.play(400, change)
    assert [(one.cause, one.ranks) for one in job.findings()] == [(Cause.HOST, (0,))]
    assert not job.ended()


def test_a_slow_node_is_one_finding_with_all_its_ranks() -> None:
    def change(step: Step) -> None:
        if step.number >= ONSET:
            step.compute[4:8] *= 1.2

    job = Job(places(8, per_node=4))
    job.slow = Slow(compute=dict.fromkeys(range(4, 8), 1.2))
    job.play(ONSET + 40, change)
    assert [one.ranks for one in job.findings()] == [(4, 5, 6, 7)]
    assert "node-1" in job.findings()[0].evidence


def test_a_rank_named_with_others_of_its_node_is_named_only_as_long_as_it_is_slow_itself() -> None:
    def change(step: Step) -> None:
        if step.number >= ONSET:
            step.compute[4] *= 1.4
            step.compute[5] *= 1.2 if step.number < ONSET + 60 else 1.0

    job = Job(places(8))
    job.slow = Slow(compute={4: 1.4, 5: 1.2})
    job.play(ONSET + 120, change)
    assert [one.ranks for one in job.findings()] == [(4, 5), (4,)]
    assert [one.finding.ranks for one in job.ended()] == [(4, 5)]
    assert job.findings()[1].evidence == job.findings()[0].evidence.replace("Ranks 4, 5", "Rank 4")
    assert job.detector.standing == (job.findings()[1],)


def test_where_two_references_differ_as_much_as_a_suspect_it_is_not_named() -> None:
    """Microseconds of a product on a machine with two CPUs, whose rank 2 was slow."""
    inquiry = Inquiry(0, {2: 0.95, 3: 0.05}, references=(0, 1))
    for told in ((41, 31, 282, 43), (32, 41, 246, 30), (40, 35, 246, 37)):
        readings = {rank: inquiry.reading(rank, {}) for rank in inquiry.suspects} if inquiry.answers["compute"] else {}
        assert inquiry.undecided(readings, math.log(1.1))
        inquiry.take(Probed("compute", dict(enumerate(told))))
        inquiry.take(Probed("memory", dict.fromkeys(range(4), 100.0)))
    slow, beside = inquiry.reading(2, {}), inquiry.reading(3, {})
    assert slow is not None
    assert cause(slow, Clock(), 0.95, math.log(1.1)) is Cause.COMPUTE
    assert beside is not None
    assert cause(beside, Clock(), 0.05, math.log(1.1)) is None


def test_a_finding_that_is_over_has_ended_and_can_come_back() -> None:
    job = Job(places(8))
    job.slow = Slow(compute={3: 1.3})
    job.play(ONSET + 60, slower(3))
    job.play(60)
    (ended,) = job.ended()
    assert ended.finding == job.findings()[0]
    assert not job.detector.standing
    job.play(60, slower(3))
    assert len(job.findings()) == 2


def test_a_probe_that_is_never_answered_is_dropped_and_asked_again() -> None:
    job = Job(places(8))
    job.answers = False
    job.play(ONSET + 40, slower(3))
    assert job.probes()
    job.answers, job.slow = True, Slow(compute={3: 1.3})
    job.play(100, slower(3))
    assert [one.ranks for one in job.findings()] == [(3,)]


def test_missing_ranks_and_steps_neither_hide_nor_accuse() -> None:
    def change(step: Step) -> None:
        slower(3)(step)
        step.missing = frozenset({step.number % 8, 5})

    job = Job(places(8))
    job.slow = Slow(compute={3: 1.3})
    job.play(ONSET + 60, change)
    assert [one.ranks for one in job.findings()] == [(3,)]


@pytest.mark.parametrize("threshold", [0.01, 1.5, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        Settings(threshold)


def test_a_small_slowdown_is_found_at_a_small_threshold_and_left_at_the_usual_one() -> None:
    fine, usual = Job(places(8), threshold=0.03), Job(places(8))
    for job in (fine, usual):
        job.slow = Slow(compute={3: 1.04})
        job.play(ONSET + 80, slower(3, 1.04))
    assert [one.ranks for one in fine.findings()] == [(3,)]
    assert not usual.findings()


@pytest.mark.parametrize(("factor", "noise"), [(1.08, 0.005), (1.06, 0.06)])
def test_what_is_below_the_threshold_for_certain_or_beyond_it_by_chance_is_left_alone(
    factor: float, noise: float
) -> None:
    job = Job(places(8), noise=noise)
    job.slow = Slow(compute={3: factor})
    job.play(1500, slower(3, factor))
    assert not job.findings()


def test_what_is_beyond_the_threshold_is_found_behind_noise_by_a_longer_look() -> None:
    job = Job(places(8), noise=0.06)
    job.slow = Slow(compute={3: 1.14})
    job.play(ONSET + 200, slower(3, 1.14))
    (finding,) = job.findings()
    assert finding.ranks == (3,)
