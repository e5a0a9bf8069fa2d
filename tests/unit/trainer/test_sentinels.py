"""Sentinels tell of figures that jump, once, and leave a run's own noise alone."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from lockstep_trainer.sentinels import NEW_LEVEL, OVER, RULES, WARM, WINDOW, Outlier, Sentinel, Sentinels

LOSS, NORM, UPDATE = RULES
RECORDED = Path(__file__).resolve().parents[3] / "docs/results/learning.json"


def feed(sentinel: Sentinel, values: list[float], first: int = 1) -> list[Outlier]:
    return [said for step, value in enumerate(values, first) if (said := sentinel.judge(step, value)) is not None]


def noise(count: int, level: float, spread: float, seed: int = 0) -> list[float]:
    drawn = random.Random(seed)
    return [level * math.exp(drawn.gauss(0, spread)) for _ in range(count)]


def test_a_jump_is_told_at_once_and_once_with_its_end() -> None:
    sentinel = Sentinel(NORM)
    assert feed(sentinel, noise(60, 1.0, 0.1)) == []
    (begun,) = feed(sentinel, [80.0, 90.0, 70.0], first=61)
    assert (begun.signal, begun.step, begun.value, begun.ended) == ("gradientNorm", 61, 80.0, False)
    assert begun.usual == pytest.approx(1.0, rel=0.1)
    assert begun.evidence.startswith("the gradient's norm is 80, ")
    (ended,) = feed(sentinel, noise(40, 1.0, 0.1, seed=1), first=64)
    assert ended.ended
    assert ended.step == 61


def test_an_episode_with_gaps_is_one() -> None:
    sentinel = Sentinel(NORM)
    feed(sentinel, noise(60, 1.0, 0.1))
    gap = noise(OVER - 1, 1.0, 0.1)
    said = feed(sentinel, [80.0, *gap, 80.0, *gap, 80.0], first=61)
    assert len(said) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_unusual_before_anything_is_known(value: float) -> None:
    (said,) = feed(Sentinel(LOSS), [value])
    assert said.step == 1
    assert said.evidence == f"the loss is {value}"
    json.dumps(said.evidence, allow_nan=False)


def test_nothing_is_judged_before_enough_is_known() -> None:
    assert feed(Sentinel(NORM), [*noise(WARM - 1, 1.0, 0.1), 1000.0]) == []
    assert len(feed(Sentinel(NORM), [*noise(WARM, 1.0, 0.1), 1000.0])) == 1


def test_what_is_small_or_within_the_noise_is_usual() -> None:
    steady = Sentinel(LOSS)
    assert feed(steady, [*[2.0] * 60, 2.9, 1e-3, 0.0]) == [], "a loss that hardly moves may move by less than half"
    noisy = Sentinel(LOSS)
    assert feed(noisy, [*noise(120, 2.0, 0.2), 2.0 * math.exp(0.2 * 8)]) == []


def test_a_wrong_half_of_the_window_hides_nothing() -> None:
    sentinel = Sentinel(UPDATE)
    feed(sentinel, noise(WINDOW, 0.2, 0.02))
    assert len(feed(sentinel, [0.5] * 40)) == 1
    assert sentinel._sorted == sorted(sentinel._logs)
    assert max(sentinel._logs) < math.log(0.3), "what is unusual is not learned"


def test_a_level_that_stays_becomes_the_usual_one() -> None:
    sentinel = Sentinel(UPDATE)
    feed(sentinel, noise(WINDOW, 0.2, 0.02))
    said = feed(sentinel, noise(NEW_LEVEL + OVER, 0.6, 0.02))
    assert [one.ended for one in said] == [False, True]
    assert len(feed(sentinel, [*noise(WARM, 0.6, 0.02), 3.0])) == 1


def test_a_falling_figure_is_no_alarm() -> None:
    said = feed(Sentinel(LOSS), [11.0 * math.exp(-step / 300) for step in range(900)])
    assert said == []


def test_recorded_runs_have_no_alarm() -> None:
    """Runs of 200 steps, from their first step on."""
    runs = [run for model in json.loads(RECORDED.read_text())["models"].values() for run in model["runs"].values()]
    assert len(runs) >= 5
    for run in runs:
        sentinels = Sentinels()
        for step, (loss, norm) in enumerate(zip(run["losses"], run["norms"], strict=True), 1):
            assert sentinels.step(step, loss=loss, gradientNorm=norm) == []


def test_figures_that_were_not_measured_are_left_out() -> None:
    sentinels = Sentinels()
    for step in range(1, 100):
        assert sentinels.step(step, loss=2.0, updateSize=None) == []
    assert [one.signal for one in sentinels.step(100, loss=9.0, updateSize=None)] == ["loss"]
