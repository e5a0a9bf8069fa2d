"""What is known survives a new generation where it is still true, and goes where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep_trainer.stragglers.detector import Detector
from stragglers.plain import Job, Slow, Step, places

ONSET = 60


def slow(step: Step) -> None:
    if step.number >= ONSET and len(step.compute) > 3:
        step.compute[3] *= 1.3


def found() -> Job:
    job = Job(places(8))
    job.slow = Slow(compute={3: 1.3})
    job.play(ONSET + 40, slow)
    assert len(job.findings()) == 1
    return job


def test_a_finding_stands_through_a_restart_and_is_not_said_again() -> None:
    job = found()
    job.restart(job.places, at=70)

    def change(step: Step) -> None:
        slow(step)
        if step.number < 73:
            step.compute *= 4  # compilation

    job.play(60, change)
    assert len(job.findings()) == 1
    assert not job.ended()


def test_a_finding_ends_when_its_rank_is_on_another_node() -> None:
    job = found()
    job.restart([replace(one, node="spare") if one.rank == 3 else one for one in job.places], at=ONSET)
    assert len(job.ended()) == 1
    job.slow = Slow()
    job.play(100)
    assert len(job.findings()) == 1


def test_a_slow_rank_on_its_new_node_is_found_again() -> None:
    job = found()
    job.restart([replace(one, node="spare") if one.rank == 3 else one for one in job.places], at=ONSET)
    job.play(40, slow)
    assert [one.ranks for one in job.findings()] == [(3,), (3,)]
    assert "spare" in job.findings()[1].evidence


def test_a_rank_alone_is_compared_with_itself_before_the_restart() -> None:
    def change(step: Step) -> None:
        step.compute *= 1.3

    job = Job(places(1))
    job.play(ONSET)
    job.restart(job.places, at=ONSET)
    job.play(10)
    job.slow = Slow(compute={0: 1.3})
    job.play(40, change)
    assert [one.ranks for one in job.findings()] == [(0,)]


def test_another_layout_begins_anew_and_ends_all_findings() -> None:
    job = found()
    job.restart(places(6), at=ONSET)
    assert len(job.ended()) == 1
    job.slow = Slow(compute={5: 1.3})

    def change(step: Step) -> None:
        step.compute[5] *= 1.3

    job.play(60, change)
    assert [one.ranks for one in job.findings()] == [(3,), (5,)]


def test_an_answer_to_a_probe_of_the_last_generation_changes_nothing() -> None:
    job = Job(places(8))
    job.answers = False
    job.play(ONSET + 25, slow)
    (probe, *_) = job.probes()
    job.restart(job.places, at=ONSET)
    job.slow = Slow(compute={3: 1.3})
    assert job.detector.probed(job.answer(probe)) == []


def test_a_rank_with_two_places_is_refused() -> None:
    with pytest.raises(ValueError, match="once"):
        Detector([*places(2), *places(1)])
