"""Kinds: nothing is to be found, or nothing that lasts."""

from __future__ import annotations

from lockstep_trainer.stragglers.work import Cause
from stragglers.scenarios.drafts import HARMLESS, SURE, Draft
from stragglers.scenarios.faults import Course, Fault
from stragglers.scenarios.scenario import Scenario
from stragglers.scenarios.slow_rank import HARDWARE, rarely


def long(draft: Draft) -> Scenario:
    """Thousands of steps."""
    draft.draw_job(most=16)
    return draft.scenario("a healthy job", draft.whole(2000, 4000), rarely=rarely(draft))


def large(draft: Draft) -> Scenario:
    """Many ranks: one of them is always the slowest by chance."""
    draft.draw_job(least=128)
    return draft.scenario("a healthy job of many ranks", 200)


def noisy(draft: Draft) -> Scenario:
    """Heavy-tailed noise, a node's shared noise, and drift."""
    draft.draw_job(most=128)
    noise = draft.noise(
        rank=draft.between(0.04, 0.1),
        outliers=draft.between(0.01, 0.03),
        node=draft.between(0.005, 0.015),
        node_steps=draft.between(5, 15),
        drift=draft.between(0.03, 0.1),
        host=0.6,
        parts=0.1,
    )
    return draft.scenario("unsteady machines, none slower than another for long", 400, noise=noise)


def drift(draft: Draft) -> Scenario:
    """All get slower and faster together by up to 15 %."""
    draft.draw_job(most=64)
    return draft.scenario("all ranks share a drift", 600, noise=draft.noise(drift=draft.between(0.08, 0.15)))


def varying(draft: Draft) -> Scenario:
    """Documents of very different lengths, for everybody."""
    draft.draw_job(
        most=128,
        attention=draft.between(0.2, 0.5),
        vary_squares=draft.between(0.4, 0.8),
        vary_tokens=draft.one(0.0, 0.05, 0.15),
    )
    return draft.scenario("ranks have more and less to do in turn", 350)


def evaluations(draft: Draft) -> Scenario:
    """Some steps are long for all."""
    draft.draw_job(most=64)
    return draft.scenario("evaluations and checkpoints", 400, rarely=rarely(draft))


def burst(draft: Draft) -> Scenario:
    """A rank is slow for 3 to 12 steps, now and then, and is well again."""
    draft.draw_job(most=128)
    rank, cause = draft.rank(), draft.one(*HARDWARE, Cause.DATA, Cause.NETWORK)
    course = Course(draft.whole(60, 100), on=draft.whole(3, 12), off=draft.whole(100, 160))
    fault = Fault(cause, draft.between(0.3, 1.0), course, units=(rank,))
    return draft.scenario(f"rank {rank} has bursts of {course.on} steps", 400, faults=(fault,))


def below(draft: Draft) -> Scenario:
    """A rank is slow by less than the threshold."""
    draft.draw_job(most=256)
    rank, most = draft.rank(), draft.between(0.2, HARMLESS) * draft.threshold
    fault = Fault(draft.one(*HARDWARE, Cause.DATA), 1.0, Course(draft.onset()), units=(rank,))
    fault = draft.fit(fault, (rank,), most=most)
    return draft.scenario(f"rank {rank} is at most {most:.1%} slow", 300, faults=(fault,))


def near(draft: Draft) -> Scenario:
    """Close to the threshold: either answer is right."""
    draft.draw_job(most=128)
    rank, target = draft.rank(), draft.between(HARMLESS, SURE) * draft.threshold
    fault = draft.slow(draft.one(*HARDWARE), rank, target, Course(draft.onset()))
    return draft.scenario(f"rank {rank} is {target:.1%} slow", 300, faults=(fault,), scored=False)
