"""Every second is in exactly one class."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep_api.messages import StepSummary
from lockstep_trainer.protocol.ledger import CLASSES, Ledger


def step(number: int, at: float, seconds: float = 1.0, **sections: float) -> StepSummary:
    return StepSummary(number, at, seconds, 2.0, 64, 1.0, 1e-3, sections)


def test_a_run_with_a_fault() -> None:
    """Start 10 s, two steps, a crash noticed half a second later, 5 s to come back, one step redone, one new."""
    ledger = Ledger(gpus=4, until=0.0)
    ledger.step(step(1, 11.0))
    ledger.step(step(2, 12.0, load=0.25))
    ledger.fault(12.5)
    ledger.step(step(2, 18.5))
    ledger.step(step(3, 20.0, seconds=1.25))
    assert {name: value for name, value in ledger.totals().items() if value} == {
        "starting": 40.0,
        "productive": 4 * (1.0 + 0.75 + 1.25),
        "dataWait": 1.0,
        "detecting": 2.0,
        "recovering": 20.0,
        "recomputing": 4.0,
        "unattributed": 1.0,
    }
    assert ledger.goodput() == pytest.approx(3.0 / 20.0)


def test_a_checkpoint_before_the_step_is_no_training() -> None:
    """What a record says of the time since the last one is classified, also where it is not part of the step."""
    ledger = Ledger(gpus=1, until=0.0)
    ledger.step(step(1, 1.0))
    ledger.step(step(2, 4.0, forward=1.0, checkpoint=1.5, evaluate=0.5))
    assert ledger.totals()["checkpointStall"] == 1.5
    assert ledger.totals()["evaluating"] == 0.5
    assert ledger.totals()["productive"] == 2.0


def test_a_step_that_compiles_first_is_compiling_until_then() -> None:
    ledger = Ledger(gpus=2, until=0.0)
    ledger.step(step(1, 40.0, seconds=31.0, forward=30.5, compile=30.0))
    totals = ledger.totals()
    assert (totals["starting"], totals["compiling"], totals["productive"]) == (18.0, 60.0, 2.0)


events = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 12), st.floats(0, 3), st.floats(0, 3), st.floats(0, 3)),
        st.tuples(st.just("fault"), st.floats(0, 5)),
        st.tuples(st.just("pass"), st.floats(0, 5), st.sampled_from(["evaluate", "forward", "checkpoint"])),
    ),
    max_size=40,
)


@given(events)
def test_classes_sum_to_the_time(history: list[tuple]) -> None:  # type: ignore[type-arg]
    """Whatever comes, late or with clocks that differ a little, no second is counted twice or dropped."""
    ledger, now = Ledger(gpus=2, until=100.0), 100.0
    for kind, *values in history:
        if kind == "step":
            number, passed, seconds, load = values
            now += passed
            ledger.step(step(number, now, seconds, load=load))
        elif kind == "fault":
            now += values[0]
            ledger.fault(now)
        else:
            now += values[0]
            ledger.pass_time(now, values[1])
        assert sum(ledger.totals().values()) == pytest.approx(2 * (ledger.until - 100.0), abs=1e-2)
        assert ledger.until <= now + 1e-9
        assert all(value >= 0 for value in ledger.totals().values())
        assert set(ledger.totals()) == set(CLASSES)
