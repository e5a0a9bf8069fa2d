"""Who gives up first when a worker does not come: the leader, since it can say who."""

from __future__ import annotations

import pytest

from lockstep_api.v1alpha1 import HangSpec
from lockstep_trainer.protocol.hangs import EXAMINE_SECONDS
from lockstep_trainer.protocol.progress import HangBounds
from lockstep_trainer.ranks import patience


@pytest.mark.parametrize("hang", [HangSpec(), HangSpec(first_step_seconds=5), HangSpec(minimum_seconds=3600)])
def test_a_worker_waits_longer_for_others_than_the_leader_does_for_a_step(hang: HangSpec) -> None:
    leader = HangBounds(hang.factor, hang.minimum_seconds, hang.first_step_seconds)
    latest = leader.allowed(None, {"rendezvous"}) + EXAMINE_SECONDS
    assert patience(hang).total_seconds() >= latest + 10  # and what messages and a busy machine take
