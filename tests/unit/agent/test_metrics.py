"""What an agent that leads shows Prometheus, and that the reference says the same of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import reference
from lockstep_api.messages import Membership, SlotInfo, StateId, StepSummary
from lockstep_trainer.agent.agent import Agent
from lockstep_trainer.agent.metrics import render
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader


@pytest.fixture
def leader() -> Leader:
    slot = SlotInfo(0, "pod", "uid-0", "boot", "127.0.0.1:1")
    leader = Leader(JobPlan("uid", nodes=1, gpus_per_node=1, steps=100), Membership("uid", 1, (slot,)), None, 0.0)
    leader.reports.newest = StepSummary(7, 5.0, 1.0, 3.0, 10, 0.5, 1e-3, {"forward": 0.5}, trained=70)
    return leader


def scraped(leader: Leader) -> dict[str, Metric]:
    """Name as in the reference → family, of an agent whose pod has staged, kept and uploaded a snapshot."""
    me = SimpleNamespace(agent_starts=1, container_starts=1)
    member = SimpleNamespace(me=me, workers=SimpleNamespace(live=()), connected=True)
    state = StateId(7, 1, 1)
    agent = SimpleNamespace(
        job=SimpleNamespace(namespace="team-a", name="web"),
        settings=SimpleNamespace(pod="web-0"),
        node=SimpleNamespace(member=member, leader=leader),
        trust=SimpleNamespace(valid=None),
        snapshots=SimpleNamespace(
            taken=1, newest=SimpleNamespace(left_out=0, blocked=0.1, copied=0.2, state=state), kept=state
        ),
        uploads=SimpleNamespace(seconds=1.0, bytes=1),
        clock=lambda: 9.0,
    )
    body, _ = render(cast(Agent, agent), "application/openmetrics-text; version=1.0.0")
    families: Any = text_string_to_metric_families(body.decode())  # type: ignore[no-untyped-call]
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in families}


def test_tokens_fall_with_the_step_where_a_restart_goes_back(leader: Leader) -> None:
    """So they are no counter: a rate would take the fall for a new beginning, and count all tokens once more."""
    before = scraped(leader)["lockstep_tokens"]
    leader.reports.newest = StepSummary(5, 8.0, 1.0, 3.0, 10, 0.5, 1e-3, trained=50)
    after = scraped(leader)["lockstep_tokens"]
    assert [(family.type, family.samples[0].value) for family in (before, after)] == [("gauge", 70), ("gauge", 50)]


def test_the_reference_has_the_types_and_labels_of_what_is_shown(leader: Leader) -> None:
    known = {metric.name: (metric.kind, metric.labels) for metric in reference.agent_metrics()}
    shown = {name: family for name, family in scraped(leader).items() if family.samples}
    assert len(shown) > 20
    for name, family in shown.items():
        assert (family.type, set(family.samples[0].labels)) == (known[name][0], set(known[name][1])), name
