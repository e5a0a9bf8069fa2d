"""Kinds: one rank, or a few, whose hardware is slow; named, they would be put aside."""

from __future__ import annotations

import math

from lockstep_trainer.stragglers.work import Cause
from stragglers.scenarios.drafts import DEVICES, SURE, Draft, Unsuited, acceptable, expect
from stragglers.scenarios.faults import Course, Fault
from stragglers.scenarios.scenario import Rarely, Scenario
from stragglers.scenarios.strength import strength

HARDWARE = (*DEVICES, Cause.HOST)


def steady(draft: Draft, cause: Cause) -> Scenario:
    """From some step on, often the first one."""
    draft.draw_job()
    return _one_slow(draft, cause, draft.target(), draft.onset())


def clock(draft: Draft) -> Scenario:
    """A device at a lower clock."""
    return steady(draft, Cause.CLOCK)


def compute(draft: Draft) -> Scenario:
    """A device that is slow at its full clock."""
    return steady(draft, Cause.COMPUTE)


def memory(draft: Draft) -> Scenario:
    """A device whose memory is slow."""
    return steady(draft, Cause.MEMORY)


def host(draft: Draft) -> Scenario:
    """A host that is late, in all steps or in every few of them: one that collects garbage all the time."""
    draft.draw_job()
    return _one_slow(draft, Cause.HOST, draft.target(), draft.onset(), chance=draft.one(1.0, draft.between(0.4, 0.7)))


def gentle(draft: Draft) -> Scenario:
    """5 to 10 %, with half of the usual threshold."""
    draft.threshold = 0.05
    draft.draw_job()
    return _one_slow(draft, draft.one(*HARDWARE), draft.target(0.1), draft.onset())


def ramp(draft: Draft) -> Scenario:
    """Slower and slower over 30 to 150 steps."""
    draft.draw_job(most=256)
    cause, rank, target = draft.one(*HARDWARE), draft.rank(), draft.target()
    begins = draft.whole(60, 120)
    course = Course(begins, full=begins + draft.whole(30, 150))
    fault = draft.slow(cause, rank, target, course)
    onset = begins + math.ceil(draft.threshold / target * (course.full - begins if course.full else 0))
    clocks = draft.one(1.0, 0.0)
    return draft.scenario(
        f"a rank gets slower until it is {target:.0%} slow",
        (course.full or 0) + draft.after(),
        faults=(fault,),
        expected=(expect([rank], *acceptable(cause, clocks), begins=begins, onset=onset),),
        clocks=clocks,
    )


def comes_and_goes(draft: Draft) -> Scenario:
    """Slow for 45 to 90 steps, well for 30 to 80, and again."""
    draft.draw_job(most=128)
    begins = draft.whole(50, 100)
    course = Course(begins, on=draft.whole(45, 90), off=draft.whole(30, 80))
    return _one_slow(draft, draft.one(*HARDWARE), draft.target(), begins, course=course, steps=begins + 380)


def recovers(draft: Draft) -> Scenario:
    """Slow for 60 to 120 steps, then well for good."""
    draft.draw_job(most=128)
    begins = draft.whole(50, 100)
    course = Course(begins, ends=begins + draft.whole(60, 120))
    steps = (course.ends or 0) + 150
    return _one_slow(draft, draft.one(*HARDWARE), draft.target(), begins, course=course, steps=steps)


def noisy(draft: Draft) -> Scenario:
    """20 to 50 % slow, on machines that are themselves unsteady."""
    draft.draw_job(most=128)
    noise = draft.noise(rank=draft.between(0.04, 0.08), outliers=draft.between(0.01, 0.03), node=0.008, drift=0.06)
    return _one_slow(draft, draft.one(*HARDWARE), draft.between(0.2, 0.5), draft.onset(), noise=noise)


def among_lengths(draft: Draft) -> Scenario:
    """Slow while documents make everybody's steps differ."""
    draft.draw_job(most=128, vary_squares=draft.between(0.3, 0.7), vary_tokens=draft.one(0.0, 0.1))
    return _one_slow(draft, draft.one(*HARDWARE), draft.target(), draft.onset())


def with_evaluations(draft: Draft) -> Scenario:
    """Slow while some steps are long for all."""
    draft.draw_job(most=128)
    return _one_slow(draft, draft.one(*HARDWARE), draft.target(), draft.onset(), rarely=rarely(draft))


def beside_imbalance(draft: Draft) -> Scenario:
    """A heavy stage, and a slow rank in it or elsewhere."""
    draft.draw_job(forms=("dp·pp", "dp·pp·tp"), replicas=4, most=256)
    layout = draft.layout
    stage = layout.pipeline - 1
    members = tuple(layout.ranks[:, stage].reshape(-1).tolist())
    heavy = draft.fit(Fault(Cause.PIPELINE, 1.0, stage=stage), members, least=draft.between(0.15, 0.3))
    rank, begins = draft.one(*members), draft.whole(60, 140)
    cause = draft.one(*DEVICES)
    slow = draft.slow(cause, rank, draft.target(), Course(begins))
    return draft.scenario(
        "the last stage is heavier, and one of its ranks becomes slow",
        begins + draft.after(),
        faults=(heavy, slow),
        expected=(expect(members, Cause.PIPELINE), expect([rank], *acceptable(cause, 1.0), begins=begins)),
        clocks=1.0,
    )


def two(draft: Draft) -> Scenario:
    """Two ranks of different replicas, at once or one after the other."""
    draft.draw_job(replicas=5, most=256)
    one, other = draft.rank(), draft.rank()
    if draft.layout.coordinates[one][0] == draft.layout.coordinates[other][0]:
        raise Unsuited
    begins = draft.onset()
    later = begins + draft.one(0, draft.whole(1, 80))
    causes = draft.one(*HARDWARE), draft.one(*HARDWARE)
    faults = tuple(
        draft.slow(cause, rank, draft.target(), Course(at))
        for cause, rank, at in zip(causes, (one, other), (begins, later), strict=True)
    )
    return draft.scenario(
        "two ranks are slow",
        later + draft.after(),
        faults=faults,
        expected=(expect([one], causes[0], begins=begins), expect([other], causes[1], begins=later)),
        clocks=1.0,
    )


def node(draft: Draft) -> Scenario:
    """All ranks of a node: its cooling, or its host."""
    draft.draw_job(least=32, replicas=4)
    layout = draft.layout
    which = draft.whole(0, layout.size // 8 - 1)
    ranks = tuple(range(8 * which, 8 * which + 8))
    for stage in range(layout.pipeline):
        peers = layout.ranks[:, stage].reshape(-1)
        if 2 * len(set(ranks) & set(peers.tolist())) >= len(peers):
            raise Unsuited
    cause, begins = draft.one(Cause.CLOCK, Cause.HOST), draft.onset()
    fault = draft.fit(Fault(cause, 1.0, Course(begins), units=ranks), ranks, least=draft.target())
    clocks = draft.one(1.0, 0.0)
    return draft.scenario(
        "all ranks of a node are slow",
        begins + draft.after(),
        faults=(fault,),
        expected=(expect(ranks, *acceptable(cause, clocks), begins=begins),),
        clocks=clocks,
    )


def link(draft: Draft) -> Scenario:
    """A rank's link; from the first step only where there are groups to compare."""
    draft.draw_job(least=4)
    groups = draft.layout.size > draft.layout.data
    begins = draft.onset() if groups else draft.whole(60, 140)
    return _one_slow(draft, Cause.NETWORK, draft.target(), begins)


def some_clocks(draft: Draft) -> Scenario:
    """A device at a lower clock, where the clocks of half of the devices are known."""
    draft.draw_job(replicas=4)
    return _one_slow(draft, Cause.CLOCK, draft.target(), draft.onset(), clocks=0.5)


def rarely(draft: Draft) -> Rarely:
    """Evaluations and checkpoints, of up to some steps' time."""
    return Rarely(
        evaluate=draft.one(0, 20, 50),
        evaluation=draft.job.compute * draft.between(0.5, 4),
        save=draft.one(10, 25),
        saving=draft.job.compute * draft.between(0.1, 0.5),
    )


def _one_slow(
    draft: Draft,
    cause: Cause,
    target: float,
    begins: int,
    *,
    course: Course | None = None,
    steps: int = 0,
    chance: float = 1.0,
    **values: object,
) -> Scenario:
    rank = draft.rank()
    fault = draft.slow(cause, rank, target, course or Course(begins), chance=chance)
    clocks = values.pop("clocks", draft.one(1.0, 1.0, 0.0))
    assert isinstance(clocks, float)
    found = strength(draft.job, fault, (rank,))
    assert found.least >= SURE * draft.threshold * 0.99, found
    return draft.scenario(
        f"rank {rank} is {found.own:.0%} slow by {cause}, the job's step {found.step:.0%}",
        steps or begins + draft.after(),
        faults=(fault,),
        expected=(expect([rank], *acceptable(cause, clocks), begins=begins, ends=fault.course.ends),),
        clocks=clocks,
        **values,
    )
