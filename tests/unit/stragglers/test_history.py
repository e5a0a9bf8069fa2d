"""Sums over windows are those of the values, however long it has run."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep_trainer.stragglers.history import History
from lockstep_trainer.stragglers.settings import LONGEST


def test_means_over_any_window_are_those_of_the_values() -> None:
    values = np.random.default_rng(1).normal(0, 0.1, (LONGEST * 2 + 17, 3))
    history = History(3, clip=10)
    for row in values:
        history.append(row)
    for last, before in ((1, 0), (20, 0), (7, 13), (LONGEST, 0)):
        end = len(values) - before
        assert history.mean(last, before) == pytest.approx(values[end - last : end].mean(axis=0))
    assert history.rows(5) == pytest.approx(values[-5:])


def test_built_at_once_it_goes_on_as_if_built_step_by_step() -> None:
    values = np.random.default_rng(1).normal(0, 0.1, (90, 2))
    one, other = History(2, clip=10), History(2, clip=10)
    for row in values:
        one.append(row)
    other.rebuild(values[:60])
    for row in values[60:]:
        other.append(row)
    assert other.mean(80) == pytest.approx(one.mean(80))
    assert other.variance == pytest.approx(one.variance, rel=0.2)


def test_a_single_value_cannot_make_a_level_and_a_missing_one_changes_none() -> None:
    history = History(2, clip=0.3)
    for _ in range(19):
        history.append(np.array([0.0, 0.1]))
    history.append(np.array([50.0, np.nan]))
    assert history.mean(20) == pytest.approx([0.015, 0.1])


def test_a_window_that_is_not_known_is_refused() -> None:
    history = History(1, clip=1)
    history.append(np.zeros(1))
    with pytest.raises(ValueError, match="last"):
        history.mean(2)
