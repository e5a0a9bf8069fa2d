"""What the training loop shows to the sentinels: the update's size as AdamW makes it, and whom it tells."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lockstep_trainer.lookout import Lookout
from lockstep_trainer.optim import updatesize
from lockstep_trainer.optim.updatesize import EVERY, rms, update_squares
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.sentinels import WARM, Sentinels


def trained(steps: int) -> tuple[list[tuple[str, nn.Parameter]], torch.optim.AdamW]:
    torch.manual_seed(0)
    named = [("a", nn.Parameter(torch.randn(5, 3))), ("b", nn.Parameter(torch.randn(7)))]
    optimizer = torch.optim.AdamW([parameter for _, parameter in named], lr=0.01, weight_decay=0.0)
    for _ in range(steps):
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return named, optimizer


def test_the_size_is_that_of_what_the_step_really_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updatesize, "_CHUNK", 4)
    named, optimizer = trained(3)
    before = [parameter.detach().clone() for _, parameter in named]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = torch.cat([(now.detach() - then).flatten() for (_, now), then in zip(named, before, strict=True)]) / 0.01
    found = rms(update_squares(named, optimizer, Layout()))
    assert found == pytest.approx(float(moved.double().square().mean().sqrt()), rel=1e-4)


def test_before_the_first_step_there_is_none() -> None:
    named, optimizer = trained(0)
    assert rms(update_squares(named, optimizer, Layout())) is None


def test_a_flipped_bit_of_a_moment_is_told_and_raises_suspicion() -> None:
    named, optimizer = trained(1)
    said: list[dict[str, Any]] = []
    suspected: list[int] = []
    lookout = Lookout(
        Sentinels(),
        lambda: update_squares(named, optimizer, Layout()),
        say=lambda kind, **fields: said.append({"kind": kind, **fields}),
        suspect=suspected.append,
    )
    last = EVERY * (WARM + 2)
    for step in range(1, last):
        if step == last - 1:  # behind the measurement of so many steps, before the next one
            optimizer.state[named[0][1]]["exp_avg"][0, 0] = 2.0**60
        lookout.look(step, 2.0, 1.0)
        lookout.updated(step)
    lookout.look(last, 2.0, 1.0)
    assert said == []
    lookout.updated(last)
    lookout.look(last + 1, 2.0, 1.0)
    (line,) = said
    assert (line["kind"], line["signal"], line["step"], line["ended"]) == ("outlier", "updateSize", last, False)
    assert suspected == [last]


def test_off_looks_at_nothing() -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    lookout = Lookout(None, None, say=never, suspect=never)
    lookout.updated(EVERY)
    lookout.look(1, math.nan, math.nan)
