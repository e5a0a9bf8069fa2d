"""Training takes the same way as plain transformers with torch's AdamW: same weights, samples and recipe."""

from __future__ import annotations

import pytest

from bench.learning import LAYOUTS, difference, train

STEPS = 12
APART = 1e-5
"""Nats per token in float32: ten times what rounding makes of a loss of 6 within so few steps."""


@pytest.mark.parametrize("model", ["llama", "qwen3-moe"])
def test_losses_follow_those_of_transformers(model: str) -> None:
    layout = next(iter(LAYOUTS[model]))
    runs = train(model, {layout: LAYOUTS[model][layout]}, STEPS, control=False)
    ours, theirs = runs[layout], runs["transformers"]
    assert theirs.losses[-1] < theirs.losses[0] - 0.1  # they learn at all, and with a rate that a mistake would show at
    apart = difference(ours, theirs)
    assert apart.largest < APART
    assert apart.held_out < APART
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-4)
