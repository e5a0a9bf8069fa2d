"""Kinds: recorded jobs, as they are, and with a fault put into their noise."""

from __future__ import annotations

from dataclasses import replace

from lockstep_trainer.stragglers.work import Cause
from stragglers.recorded import FOLDER, Trace, read
from stragglers.scenarios.drafts import Draft, acceptable, expect
from stragglers.scenarios.faults import Course
from stragglers.scenarios.layout import Layout
from stragglers.scenarios.physics import Transfers
from stragglers.scenarios.scenario import Scenario
from stragglers.scenarios.slow_rank import HARDWARE

STEPS = 300


def clean(draft: Draft) -> Scenario:
    """As recorded."""
    trace = _draw(draft)
    return draft.scenario("a recorded job", STEPS, trace=trace)


def slow(draft: Draft) -> Scenario:
    """A rank is made 15 to 50 % slow."""
    trace = _draw(draft)
    cause, rank = draft.one(*HARDWARE, Cause.DATA), draft.rank()
    begins, clocks = draft.whole(60, 120), draft.one(1.0, 0.0)
    fault = draft.slow(cause, rank, draft.scale(0.15, 0.5), Course(begins))
    return draft.scenario(
        f"a recorded job, rank {rank} made slow",
        STEPS,
        faults=(fault,),
        expected=(expect([rank], *acceptable(cause, clocks), begins=begins),),
        clocks=clocks,
        trace=trace,
    )


def _draw(draft: Draft) -> Trace:
    """A part of the recording; the draft becomes a job as long as its steps are."""
    whole = read(FOLDER / "cpu4.jsonl.gz")
    trace = whole.window(draft.whole(0, len(whole.compute) - STEPS), STEPS)
    compute = float(trace.compute.mean())
    draft.draw_job(forms=("dp",), least=4, most=4)
    draft.per_node = 2
    draft.job = replace(
        draft.job,
        layout=draft.one(Layout(4), Layout(2, tensor=2)),
        compute=compute,
        host=0.02 * compute,
        batch=0.005 * compute,
        transfers=Transfers(data=0.1 * compute, pipeline=0.0, tensor=0.1 * compute),
        vary_squares=0.0,
    )
    return trace
