"""What the workload does to itself is reported as that, and blames no node."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep_trainer.stragglers.work import Cause
from stragglers.plain import SQUARES, Change, Job, Slow, Step, places

ATTENTION = 0.3


def documents(rank: int | None, longer: float, seed: int = 3) -> Change:
    """Lengths vary on all ranks, and attention with them; those of a rank are longer."""
    random = np.random.default_rng(seed)

    def change(step: Step) -> None:
        lengths = np.exp(random.normal(0, 0.3, len(step.compute)))
        if rank is not None:
            lengths[rank] *= longer
        step.squares = SQUARES * lengths
        step.compute *= 1 - ATTENTION + ATTENTION * lengths

    return change


def test_a_rank_whose_documents_are_longer_is_named_for_them_and_not_for_its_device() -> None:
    job = Job(places(8))
    job.play(150, documents(3, 2.0))
    (finding,) = job.findings()
    assert (finding.cause, finding.ranks) == (Cause.LENGTHS, (3,))
    assert not finding.cause.blames_node
    assert finding.slowdown == pytest.approx(ATTENTION, rel=0.4)


def test_lengths_that_vary_by_chance_accuse_nobody() -> None:
    job = Job(places(8))
    job.play(600, documents(None, 1.0))
    assert not job.findings()


def test_a_slow_rank_is_found_among_documents_of_all_lengths() -> None:
    vary = documents(None, 1.0)

    def change(step: Step) -> None:
        vary(step)
        if step.number >= 60:
            step.compute[3] *= 1.15

    job = Job(places(8))
    job.slow = Slow(compute={3: 1.15})
    job.play(100, change)
    assert [(one.cause, one.ranks) for one in job.findings()] == [(Cause.COMPUTE, (3,))]


@pytest.mark.parametrize("every", [1, 5])
def test_a_rank_that_waits_for_its_batches_is_named_also_when_it_does_now_and_then(every: int) -> None:
    def change(step: Step) -> None:
        if step.number >= 60 and step.number % every == 0:
            step.data[2] += 0.2 * every

    job = Job(places(8))
    job.play(150, change)
    (finding,) = job.findings()
    assert (finding.cause, finding.ranks) == (Cause.DATA, (2,))
    assert not job.probes()


def test_all_ranks_waiting_for_batches_in_turn_names_none_of_them() -> None:
    def change(step: Step) -> None:
        step.data[step.number % 8] += 0.4

    job = Job(places(8))
    job.play(150, change)
    assert [(one.cause, one.ranks) for one in job.findings()] == [(Cause.DATA, ())]


@pytest.mark.parametrize(
    ("ranks", "pipeline", "every", "since"), [(8, 1, 1, 60), (8, 1, 3, 60), (2, 1, 1, 0), (4, 2, 1, 60)]
)
def test_all_ranks_waiting_for_batches_at_once_are_one_finding_that_names_none(
    ranks: int, pipeline: int, every: int, since: int
) -> None:
    """Nobody is slower than the others: a store or a network that all read from."""

    def change(step: Step) -> None:
        if since <= step.number < 400 and step.number % every == 0:
            step.data += 0.25 * every

    job = Job(places(ranks, pipeline))
    job.play(400, change)
    (finding,) = job.findings()
    assert (finding.cause, finding.ranks) == (Cause.DATA, ())
    assert abs(finding.since - max(since, 3)) <= 3 * every
    assert finding.slowdown == pytest.approx(0.25, rel=0.1)
    assert finding.evidence.startswith("All ranks at once waited for batches")
    job.play(200)
    assert len(job.ended()) == 1


def test_a_store_that_is_away_for_a_moment_is_no_finding() -> None:
    def change(step: Step) -> None:
        if step.number in (80, 81, 150):
            step.data += 20.0

    job = Job(places(8))
    job.play(300, change)
    assert not job.findings()


def test_pauses_of_now_one_host_now_another_are_one_finding_that_names_none() -> None:
    random = np.random.default_rng(5)

    def change(step: Step) -> None:
        if 60 <= step.number < 400 and random.random() < 0.2:
            step.host[random.integers(8)] += 0.6

    job = Job(places(8))
    job.play(400, change)
    assert [(one.cause, one.ranks) for one in job.findings()] == [(Cause.PAUSES, ())]
    job.play(200)
    assert len(job.ended()) == 1


def test_pauses_that_cost_less_than_the_threshold_are_left_alone() -> None:
    random = np.random.default_rng(5)

    def change(step: Step) -> None:
        if random.random() < 0.06:
            step.host[random.integers(8)] += 0.6

    job = Job(places(8))
    job.play(2000, change)  # 3.6 %, and in some window of 40 steps more than 9 %
    assert not job.findings()


def test_a_few_long_checkpoints_are_no_pauses() -> None:
    random = np.random.default_rng(5)

    def change(step: Step) -> None:
        if step.number % 50 == 0:
            step.host += random.exponential(0.3, 8)

    job = Job(places(8))
    job.play(500, change)
    assert not job.findings()


def test_a_stage_with_more_to_do_is_an_imbalance_when_its_devices_are_fine() -> None:
    def change(step: Step) -> None:
        step.compute[3::4] *= 1.25  # the last of four stages

    job = Job(places(4, pipeline=4))
    job.play(60, change)
    (finding,) = job.findings()
    assert (finding.cause, finding.ranks) == (Cause.PIPELINE, (3, 7, 11, 15))
    assert "stage 3" in finding.evidence


def test_a_slow_device_alone_in_its_stage_is_no_imbalance() -> None:
    def change(step: Step) -> None:
        step.compute[2] *= 1.25

    job = Job(places(1, pipeline=4, per_node=1))
    job.slow = Slow(compute={2: 1.25})
    job.play(80, change)
    assert [(one.cause, one.ranks) for one in job.findings()] == [(Cause.COMPUTE, (2,))]


def test_one_slow_rank_of_a_stage_is_no_imbalance() -> None:
    def change(step: Step) -> None:
        step.compute[3] *= 1.4

    job = Job(places(2, pipeline=4))
    job.slow = Slow(compute={3: 1.4})
    job.play(80, change)
    assert [(one.cause, one.ranks) for one in job.findings()] == [(Cause.COMPUTE, (3,))]
