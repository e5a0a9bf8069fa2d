"""Learning rate and size of the batch over the steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lockstep_api.v1alpha1 import BatchRampSpec, RecipeSpec, ScheduleSpec
from lockstep_trainer.errors import UserError
from lockstep_trainer.optim.ramp import BatchRamp
from lockstep_trainer.optim.schedule import learning_rate

COSINE_85 = 0.1 + 0.9 * 0.5 * (1 + math.cos(0.75 * math.pi))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "cosine"}, {1: 0.1, 5: 0.5, 10: 1.0, 60: 0.55, 85: COSINE_85, 110: 0.1}),
        ({"name": "linear"}, {5: 0.5, 10: 1.0, 60: 0.55, 85: 0.325, 110: 0.1}),
        ({"name": "constant"}, {5: 0.5, 10: 1.0, 60: 1.0, 110: 1.0}),
        ({"name": "wsd", "decay": 20}, {5: 0.5, 10: 1.0, 90: 1.0, 95: 0.775, 100: 0.55, 110: 0.1}),
        ({"name": "wsd"}, {10: 1.0, 99: 1.0, 110: 0.1}),  # a tenth of 110 steps
        ({"name": "wsd", "decay": 100}, {10: 1.0, 60: 0.55, 110: 0.1}),
    ],
)
def test_learning_rate_rises_and_falls(schedule: dict[str, object], expected: dict[int, float]) -> None:
    spec = ScheduleSpec.model_validate({**schedule, "warmup": 10, "final_ratio": 0.1})
    for step, rate in expected.items():
        assert learning_rate(step, steps=110, peak=1.0, schedule=spec) == pytest.approx(rate), step


@given(
    name=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 60),
    ratio=st.floats(0, 1),
)
def test_learning_rate_never_leaves_its_bounds_nor_rises_again(
    name: str, steps: int, warmup: int, ratio: float
) -> None:
    assume(warmup <= steps)
    spec = ScheduleSpec(name=name, warmup=warmup, final_ratio=ratio)
    rates = [learning_rate(step, steps=steps, peak=2.0, schedule=spec) for step in range(1, steps + 1)]
    assert all(0 <= rate <= 2.0 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    after = rates[max(0, warmup - 1) :]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
    if name != "constant" and warmup < steps:
        assert rates[-1] == pytest.approx(2.0 * ratio)


def recipe(ramp: BatchRampSpec | None, tokens: int = 4096, steps: int = 1000) -> RecipeSpec:
    return RecipeSpec(steps=steps, global_batch_tokens=tokens, batch_ramp=ramp)


def test_a_ramp_ends_at_the_whole_batch() -> None:
    ramp = BatchRamp.of(
        recipe(BatchRampSpec(start_tokens=1024, steps=10, increments=3)), sequence_length=128, data_width=8
    )
    sizes = [ramp.samples(step) for step in range(1, 14)]
    assert sizes == [8, 8, 8, 8, 16, 16, 16, 24, 24, 24, 32, 32, 32]


def test_without_a_ramp_all_batches_are_whole() -> None:
    ramp = BatchRamp.of(recipe(None), sequence_length=128, data_width=2)
    assert (ramp.samples(1), ramp.samples(900), ramp.samples_before(901)) == (32, 32, 900 * 32)


@given(first=st.integers(1, 5), increase=st.integers(0, 4), increments=st.integers(1, 9), extra=st.integers(0, 30))
def test_samples_before_a_step_are_those_of_its_predecessors(
    first: int, increase: int, increments: int, extra: int
) -> None:
    ramp = BatchRamp(first, increase, increments, increments + extra)
    done = 0
    for step in range(1, increments + extra + 10):
        assert ramp.samples_before(step) == done
        done += ramp.samples(step)
    assert (ramp.samples(1), ramp.samples(increments + extra + 1)) == (first, first + increments * increase)
    assert ramp.level(increments + extra) == increments - 1


@pytest.mark.parametrize(
    ("ramp", "tokens", "words"),
    [
        (
            BatchRampSpec(start_tokens=1000, steps=10, increments=3),
            4096,
            "batchRamp: startTokens and each of the parts",
        ),
        (BatchRampSpec(start_tokens=1024, steps=10, increments=4), 4096, "= 1024; change startTokens or increments"),
        (None, 4000, "globalBatchTokens: 4000 is not a multiple of .* = 1024; choose a multiple"),
    ],
)
def test_batches_that_do_not_divide_are_refused(ramp: BatchRampSpec | None, tokens: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        BatchRamp.of(recipe(ramp, tokens), sequence_length=128, data_width=8)
