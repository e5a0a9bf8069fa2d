"""A short soak: faults of all kinds, about one every 15 s, and nothing of operators and agents grows.

An hour of it is ``python -m soak``; there the memory's slope is judged as well, which takes longer than this.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from demonstration.target import Target
from soak.campaign import Plan, soak
from soak.result import judge, problems

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def test_minutes_of_random_faults(lockstep: Target, tmp_path: Path) -> None:
    plan = Plan(seed=5, minutes=2.5, mean_gap=15, step_seconds=0.25)
    soaked = soak(lockstep, tmp_path, plan, say=print)
    judged = judge(soaked.readings, plan)
    memory_apart = [sentence for sentence in problems(soaked, judged) if not sentence.startswith("memory")]
    assert not memory_apart
    assert soaked.checked.exact, soaked.checked
    # On a slow machine faults wait for the job to get on: few come then.
    assert len([blow for blow in soaked.blows if not blow.missed]) >= 2
    assert soaked.ended.status.goodput is not None
