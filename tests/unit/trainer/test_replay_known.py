"""Ranks that compute known numbers: who comes to other bits than its like is named, and nobody by another kind's."""

from __future__ import annotations

import pytest
import torch

from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.replay.known import REPEATS, Answers, Known, judge_known
from lockstep_trainer.replay.units import Units

UNITS = Units(Layout(shard=2, tensor=2))


def answers(product: int, *, device: str = "H100", then: int | None = None, repeats: tuple[int, ...] = ()) -> Answers:
    before = {} if then is None else {"product": (then,) * REPEATS}
    return Answers(device, {"product": repeats or (product,) * REPEATS, "sum": (7,) * REPEATS}, before)


def test_ranks_that_agree_are_sound() -> None:
    assert judge_known(UNITS, [answers(1)] * 4) == ()
    assert judge_known(UNITS, [answers(1, then=1)] * 4) == ()


def test_who_is_outvoted_is_named() -> None:
    (verdict,) = judge_known(UNITS, [answers(1), answers(1), answers(1), answers(2)])
    assert (verdict.kind, verdict.ranks, verdict.unit, verdict.confidence) == ("permanent", (3,), 1, 1.0)
    assert str(verdict.point) == "product (check, stage 0)"
    assert verdict.evidence == (
        "rank 3 computes a product of known numbers to other bits than 3 ranks with a device of its kind"
    )


def test_half_of_the_ranks_outvote_nobody() -> None:
    assert judge_known(UNITS, [answers(1), answers(1), answers(2), answers(2)]) == ()


def test_devices_of_another_kind_are_compared_among_themselves() -> None:
    mixed = [answers(1), answers(1), answers(1), answers(2, device="A100")]
    assert judge_known(UNITS, mixed) == ()


def test_who_had_other_bits_before_is_named_where_nobody_is_outvoted() -> None:
    (verdict,) = judge_known(UNITS, [answers(1, then=1), answers(2, then=1)])
    assert (verdict.kind, verdict.ranks) == ("permanent", (1,))
    assert verdict.evidence.endswith("to other bits than when the generation began")


def test_who_does_not_repeat_itself_is_named() -> None:
    (verdict,) = judge_known(UNITS, [answers(1), answers(1, repeats=(1, 1, 2))])
    assert (verdict.kind, verdict.ranks) == ("intermittent", (1,))
    assert verdict.evidence.endswith("and does not repeat itself")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_cpu_repeats_all_of_it(dtype: torch.dtype) -> None:
    known = Known(UNITS, None, device=torch.device("cpu"), dtype=dtype)
    known.remember()
    assert len(known._then) == 5
    assert {len(set(digests)) for digests in known._then.values()} == {1}
    assert len({digests[0] for digests in known._then.values()}) == 5
    again = Known(UNITS, None, device=torch.device("cpu"), dtype=dtype)
    again.remember()
    assert again._then == known._then
