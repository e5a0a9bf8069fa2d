"""The expected time is what a healthy rank needs, whatever single ranks and steps do."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep_trainer.stragglers.expected import fit

TOKENS, SQUARES = 8000.0, 8e6


def batch(steps: int = 60, ranks: int = 8, vary_tokens: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    tokens = TOKENS * (1 + vary_tokens * random.uniform(-1, 1, (steps, ranks)))
    squares = SQUARES * np.exp(random.normal(0, 0.4, (steps, ranks)))
    compute = 0.6 * tokens / TOKENS + 0.3 * squares / SQUARES + 0.1
    return compute * np.exp(random.normal(0, 0.01, (steps, ranks))), tokens, squares


def test_a_slow_rank_long_steps_and_outliers_change_little() -> None:
    compute, tokens, squares = batch()
    compute[:, 3] *= 1.4
    compute[10:14] *= 2
    compute[::9, 5] *= 6
    compute[5, 1] = np.nan
    model = fit(compute, tokens, squares)
    assert model is not None
    assert model.beta * SQUARES == pytest.approx(0.3, rel=0.1)
    assert model.alpha * TOKENS + model.gamma == pytest.approx(0.7, rel=0.05)


def test_the_same_tokens_in_each_step_leave_only_what_can_be_told_apart() -> None:
    compute, tokens, squares = batch(vary_tokens=0.0)
    model = fit(compute, tokens, squares)
    assert model is not None
    assert model.gamma == 0
    assert model.beta * SQUARES == pytest.approx(0.3, rel=0.1)
    same = fit(compute, tokens, np.full_like(squares, SQUARES))
    assert same is not None
    assert same.beta == 0


def test_nothing_computed_is_no_model() -> None:
    nothing = np.full((10, 4), np.nan)
    assert fit(nothing, nothing, nothing) is None
