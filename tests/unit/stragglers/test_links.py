"""A slow link is named by pairs, in three rounds whatever the number of ranks."""

from __future__ import annotations

import pytest

from lockstep_trainer.stragglers.pairs import LinkInquiry, matching
from lockstep_trainer.stragglers.work import Cause, Probe
from stragglers.plain import Change, Job, Slow, Step, places

ONSET = 60


def transfer(factor: float) -> Change:
    def change(step: Step) -> None:
        if step.number >= ONSET:
            step.transfer *= factor

    return change


@pytest.mark.parametrize("ranks", [3, 4, 5, 8, 16, 64])
def test_the_rank_whose_pairs_are_all_slow_is_named(ranks: int) -> None:
    job = Job(places(ranks, per_node=1))
    job.play(ONSET)
    job.slow = Slow(link={2: 2.0})
    job.play(40, transfer(2.0))
    (finding,) = job.findings()
    assert (finding.cause, finding.ranks) == (Cause.NETWORK, (2,))
    assert abs(finding.since - ONSET) <= 3
    assert len([one for number, one in job.said if isinstance(one, Probe) and number > ONSET]) == 3


def test_a_link_slow_from_the_first_step_is_named_and_ends_when_it_is_fast_again() -> None:
    def slow(step: Step) -> None:
        step.transfer *= 2

    job = Job(places(8, per_node=1))
    job.slow = Slow(link={2: 2.0})
    job.play(100, slow)
    (finding,) = job.findings()
    assert (finding.cause, finding.ranks) == (Cause.NETWORK, (2,))
    job.play(40)
    assert [one.finding for one in job.ended()] == [finding]


def test_links_that_are_slow_for_a_moment_at_the_start_accuse_nobody() -> None:
    job = Job(places(8, per_node=1))
    job.slow = Slow(link={2: 2.0})
    job.play(12)
    job.slow = Slow()
    job.play(40)
    assert not job.findings()


def test_healthy_links_are_looked_at_once() -> None:
    job = Job(places(16))
    job.play(100)
    assert len(job.probes("link")) == 1


def test_pairs_of_a_round_are_disjoint() -> None:
    job = Job(places(16, per_node=4))
    job.play(ONSET)
    job.slow = Slow(link={2: 2.0, 9: 2.0})
    job.play(40, transfer(2.0))
    assert {rank for one in job.findings() for rank in one.ranks} == {2, 9}
    for probe in job.probes("link"):
        ranks = [rank for pair in probe.pairs for rank in pair]
        assert len(ranks) == len(set(ranks))


def test_transfers_that_take_longer_on_healthy_links_accuse_nobody() -> None:
    job = Job(places(8, per_node=1))
    job.play(ONSET + 100, transfer(1.5))
    assert not job.findings()
    assert len(job.probes("link")) > 1


def test_of_two_ranks_none_is_accused_of_the_link_between_them() -> None:
    job = Job(places(2, per_node=1))
    job.slow = Slow(link={1: 3.0})
    job.play(ONSET + 60, transfer(3.0))
    assert not job.findings()


def test_a_transfer_that_costs_the_step_next_to_nothing_is_left_alone() -> None:
    def change(step: Step) -> None:
        step.transfer = 0.001 if step.number < ONSET else 0.002

    job = Job(places(8, per_node=1))
    job.play(ONSET + 60, change)
    assert len(job.probes("link")) <= 1


def test_what_a_slow_rank_explains_is_not_held_against_its_partners() -> None:
    inquiry = LinkInquiry(0, {}, tuple(range(8)), {rank: f"node-{rank}" for rank in range(8)})
    inquiry.rounds = [
        {(0, 4): 2.0, (1, 5): 1.0, (2, 6): 1.01, (3, 7): 0.99},
        {(0, 5): 2.0, (4, 6): 1.08, (1, 7): 1.0, (2, 3): 1.02},
        {(0, 6): 2.0, (4, 7): 1.08, (1, 2): 0.99, (3, 5): 1.0},
    ]
    assert set(inquiry.slow(0.1)) == {0}


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8])
def test_rounds_pair_each_rank_with_others(count: int) -> None:
    rounds = [matching(range(count), round_) for round_ in range(3)]
    pairs = [pair for round_ in rounds for pair in round_]
    assert len(pairs) == len(set(pairs))
    assert all(sum(rank in pair for pair in pairs) >= 2 for rank in range(count))
