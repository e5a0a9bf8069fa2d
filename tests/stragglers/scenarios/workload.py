"""Kinds: the workload, the store or pauses make the job slow; no device is to be put aside."""

from __future__ import annotations

from lockstep_trainer.stragglers.work import Cause
from stragglers.scenarios.drafts import HARMLESS, SURE, Draft, Unsuited, expect
from stragglers.scenarios.faults import Course, Fault
from stragglers.scenarios.scenario import Scenario
from stragglers.scenarios.strength import strength

STAGED = ("dp·pp", "dp·pp·tp")


def data_rank(draft: Draft) -> Scenario:
    """One rank's loader is slow: always, or in some of the steps."""
    draft.draw_job()
    rank, begins = draft.rank(), draft.onset()
    chance = draft.one(1.0, draft.between(0.3, 0.6))
    fault = draft.slow(Cause.DATA, rank, draft.target(), Course(begins), chance=chance)
    return draft.scenario(
        f"rank {rank} waits for its batches in {chance:.0%} of the steps",
        begins + draft.after(),
        faults=(fault,),
        expected=(expect([rank], Cause.DATA, begins=begins),),
    )


def data_store(draft: Draft) -> Scenario:
    """The store is slow for everybody."""
    draft.draw_job()
    begins = draft.onset()
    fault = Fault(Cause.DATA, 1.0, Course(begins), chance=draft.one(1.0, draft.between(0.3, 0.6)))
    fault = draft.fit(fault, (), least=draft.target())
    return draft.scenario(
        "all ranks wait for their batches",
        begins + draft.after(),
        faults=(fault,),
        expected=(expect([], Cause.DATA, begins=begins),),
    )


def pauses(draft: Draft) -> Scenario:
    """Hosts stand still now and then, none more than another, and each time all wait."""
    draft.draw_job(least=8)
    begins = draft.onset(at_start=0.6)
    fault = Fault(Cause.PAUSES, 1.0, Course(begins), chance=draft.between(0.3, 0.6) / draft.layout.size)
    fault = draft.fit(fault, (), least=draft.between(1.5 * draft.threshold, 0.4))
    return draft.scenario(
        f"each rank pauses in {fault.chance:.1%} of its steps, for {fault.size:.1f} steps",
        begins + draft.after() + 100,
        faults=(fault,),
        expected=(expect([], Cause.PAUSES, begins=begins),),
    )


def lengths(draft: Draft) -> Scenario:
    """One data rank always gets the longer documents."""
    draft.draw_job(
        replicas=3, attention=draft.between(0.3, 0.6), vary_squares=draft.between(0.05, 0.3), vary_tokens=0.0
    )
    data, begins = draft.whole(0, draft.layout.data - 1), draft.onset(at_start=0.6)
    ranks = tuple(draft.layout.ranks[data].reshape(-1).tolist())
    fault = draft.fit(Fault(Cause.LENGTHS, 1.0, Course(begins), data=data), ranks, least=draft.target())
    return draft.scenario(
        f"data rank {data} has {1 + fault.size:.1f} times the Σ length² of the others",
        begins + draft.after(),
        faults=(fault,),
        expected=(expect(ranks, Cause.LENGTHS, begins=begins, any_part=True),),
    )


def heavy_head(draft: Draft) -> Scenario:
    """The last stage has the head, and as many layers as the others."""
    draft.draw_job(forms=STAGED)
    return _heavy(draft, draft.layout.pipeline - 1, Fault(Cause.PIPELINE, 1.0), draft.target())


def one_more_layer(draft: Draft) -> Scenario:
    """A stage has one layer more than the others, of 2 to 5."""
    draft.draw_job(forms=STAGED)
    layers = draft.whole(2, 5)
    return _heavy(draft, draft.whole(0, draft.layout.pipeline - 1), Fault(Cause.PIPELINE, 1 / layers), 0.0)


def _heavy(draft: Draft, stage: int, fault: Fault, target: float) -> Scenario:
    ranks = tuple(draft.layout.ranks[:, stage].reshape(-1).tolist())
    fault = Fault(fault.cause, fault.size, stage=stage)
    if target:
        fault = draft.fit(fault, ranks, least=target)
    found = strength(draft.job, fault, ranks)
    if found.least < SURE * draft.threshold:
        raise Unsuited
    return draft.scenario(
        f"stage {stage} of {draft.layout.pipeline} computes {found.own:.0%} more than the others",
        200 if draft.layout.size <= 64 else 120,
        faults=(fault,),
        expected=(expect(ranks, Cause.PIPELINE),),
    )


def slight_stage(draft: Draft) -> Scenario:
    """A stage has a little more to do, less than the threshold."""
    draft.draw_job(forms=STAGED, most=256)
    stage = draft.layout.pipeline - 1
    ranks = tuple(draft.layout.ranks[:, stage].reshape(-1).tolist())
    most = draft.between(0.3, HARMLESS) * draft.threshold
    fault = draft.fit(Fault(Cause.PIPELINE, 1.0, stage=stage), ranks, most=most)
    return draft.scenario(f"the last stage has up to {most:.1%} more to do", 250, faults=(fault,))


def slight_lengths(draft: Draft) -> Scenario:
    """A data rank gets slightly longer documents."""
    draft.draw_job(replicas=3, most=128, vary_squares=draft.between(0.05, 0.3))
    ranks = tuple(draft.layout.ranks[0].reshape(-1).tolist())
    most = draft.between(0.3, HARMLESS) * draft.threshold
    fault = draft.fit(Fault(Cause.LENGTHS, 1.0, data=0), ranks, most=most)
    return draft.scenario(f"a data rank has up to {most:.1%} more to do", 250, faults=(fault,))


def hiccup(draft: Draft) -> Scenario:
    """The store is away for a moment: one to three steps wait for many steps' time."""
    draft.draw_job(most=128)
    begins = draft.whole(60, 200)
    fault = Fault(Cause.DATA, draft.between(3, 30), Course(begins, ends=begins + draft.whole(1, 3)))
    return draft.scenario("all wait for the store once", begins + 150, faults=(fault,))


def rare_pauses(draft: Draft) -> Scenario:
    """Pauses that cost 1 to 5 % of the job's time."""
    draft.draw_job(most=128)
    size = draft.between(0.5, 3)
    chance = draft.between(0.01, 0.05) / size / draft.layout.size
    fault = Fault(Cause.PAUSES, size, chance=chance)
    return draft.scenario("pauses, too rare to matter", 400, faults=(fault,))
