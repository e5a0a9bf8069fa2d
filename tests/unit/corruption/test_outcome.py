"""How the corruption benchmark judges a trial: nothing that was missed or wrongly blamed may count as anything else."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from corruption.outcome import Outcome, Tally, expected_delay, outcome
from corruption.virtual import steps_until_found

STRUCK, PARTNER, OF_ANOTHER_UNIT = 4, 5, 2  # of dp4-tp2: units are (0, 1), (2, 3), …


def heard(*ranks: list[int], step: int = 2, kind: str = "permanent") -> list[dict[str, Any]]:
    return [{"step": step, "run": 1, "rejected": True, "verdicts": [{"kind": kind, "ranks": each} for each in ranks]}]


def judged(**fields: Any) -> Outcome:
    fault = {"rank": STRUCK, "site": "product", "bit": 3, "rate": 0.5}
    record = {
        "name": "n",
        "trial": {"layout": "dp4-tp2", "kind": "sampled", "share": 1.0, "fault": fault},
        "strikes": [[1, "first", True]],
        "heard": [],
        "harmed_at": None,
        "equal": True,
    }
    kind = fields.pop("kind", None)
    if kind is not None:
        record["trial"] = {**record["trial"], "kind": kind}  # type: ignore[dict-item]
    return outcome({**record, **fields})


@pytest.mark.parametrize(
    ("ranks", "located"),
    [
        ([[STRUCK]], "rank"),
        ([[STRUCK, PARTNER]], "stage"),
        ([[STRUCK, OF_ANOTHER_UNIT]], "undecided"),
        ([[OF_ANOTHER_UNIT]], "wrong"),
        ([[STRUCK], [OF_ANOTHER_UNIT]], "wrong"),
        ([[PARTNER]], "wrong"),
        ([], "wrong"),
    ],
)
def test_who_is_named(ranks: list[list[int]], located: str) -> None:
    assert judged(heard=heard(*ranks)).located == located


def test_a_step_that_was_accepted_before_the_find_was_not_found_in_time() -> None:
    assert judged(heard=heard([STRUCK])).in_time
    assert not judged(heard=heard([STRUCK]), harmed_at=1, equal=False).in_time
    assert not judged(heard=heard([STRUCK]), harmed_at=2, equal=False).in_time  # accepted in the end


def test_the_delay_counts_from_the_first_strike() -> None:
    assert judged(heard=heard([STRUCK], step=5), strikes=[[2, "other", True], [5, "first", True]]).delay == 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"strikes": []}, "no strike"),
        ({}, "no change"),
        ({"harmed_at": 1, "equal": False}, "missed"),
        ({"harmed_at": 1, "strikes": [[1, "other", True]]}, "other"),
        ({"harmed_at": 1, "strikes": [[1, "other", True], [2, "first", True]]}, "missed"),
        ({"harmed_at": 1, "strikes": [[1, "first", False]]}, "unsampled"),
        ({"harmed_at": 1, "strikes": [[1, "first", False], [2, "replay", True]]}, "missed"),
        ({"kind": "sum", "harmed_at": 1}, "memory"),
        ({"kind": "shard", "harmed_at": 1}, "missed"),
        ({"kind": "shard"}, "no change"),
        ({"kind": "everywhere", "harmed_at": 1}, "everywhere"),
    ],
)
def test_why_it_was_not_found(fields: dict[str, Any], reason: str) -> None:
    assert judged(**fields).reason == reason


def test_misses_count_as_within_reach() -> None:
    tally = Tally.of([judged(heard=heard([STRUCK])), judged(), judged(harmed_at=1)])
    assert (tally.trials, tally.found, tally.within_reach) == (3, 1, 2)
    assert asdict(tally)["reasons"] == {"no change": 1, "missed": 1}
    assert asdict(tally)["located"] == {"rank": 1}


@pytest.mark.parametrize(("rate", "share"), [(1.0, 0.1), (0.5, 0.1), (0.1, 0.5)])
def test_virtual_steps_agree_with_the_formula(rate: float, share: float) -> None:
    """A number of either one's steps is geometric: the mean of 400 is within a fifth with probability 0.9999."""
    steps = [steps_until_found(seed, share, rate) for seed in range(400)]
    assert sum(steps) / len(steps) == pytest.approx(expected_delay(rate, share), rel=0.2)
