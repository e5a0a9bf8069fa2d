"""Who is given up, on whose word."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from lockstep_api.messages import Recovered, Term
from lockstep_operator.plan.losses import LOOPING_SECONDS
from lockstep_operator.plan.observed import Agent
from lockstep_operator.plan.status import find_condition
from unit.operator.builders import START, World, inventory, make_job, replace_request, running, summary


def silence_leader(world: World, seconds: float) -> None:
    """The operator's stream to the leader was cut so long ago."""
    assert world.leader is not None
    world.leader = replace(world.leader, connected=False, since=world.now - seconds)


def members_say(world: World, silent: float | None) -> None:
    """The other members answer that they last heard the leader so long ago."""
    for pod in list(world.pods.values()):
        if pod.name != world.status.slots.get("0"):
            world.agents[pod.uid] = Agent(inventory(pod, 1, leader_silent=silent), world.now)


# --------------------------------------------------------------------------------- the leader is silent


@pytest.mark.parametrize(
    ("silence", "members", "node_ready", "nodes", "lost"),
    [
        (1.0, 6.0, True, 3, False),  # too early
        (5.0, 5.0, True, 3, True),  # operator and members agree
        (2.0, 7.9, True, 3, False),
        (2.0, 8.0, True, 3, True),  # an operator that came later
        (1.9, 60.0, True, 3, False),
        (60.0, 4.9, True, 3, False),
        (300.0, 0.5, True, 3, False),  # only the operator's own connection is broken
        (59.0, None, True, 3, False),  # one witness: not before the deadline
        (61.0, None, True, 3, True),
        (6.0, None, False, 3, True),  # the node's condition agrees
        (59.0, None, True, 1, False),  # nobody else to ask
        (61.0, None, True, 1, True),
    ],
)
def test_a_silent_leader_is_replaced_when_two_witnesses_agree(
    silence: float, members: float | None, node_ready: bool, nodes: int, lost: bool
) -> None:
    world = running(nodes=nodes)
    world.now += 1000
    silence_leader(world, silence)
    members_say(world, members)
    if not node_ready:
        world.take_down("node-0")
    decided = world.plan()
    assert ("0" not in decided.status.slots or decided.status.slots["0"] != "run-0-0") is lost


def test_an_operator_that_reaches_nobody_blames_itself() -> None:
    """Protects a whole fleet of healthy jobs from an operator whose own network is broken."""
    world = running(nodes=3)
    world.now += 1000
    silence_leader(world, 500)
    world.agents = {uid: Agent(agent.inventory, world.now - 900) for uid, agent in world.agents.items()}
    assert world.plan().status.slots == world.status.slots


def test_members_are_asked_about_a_silent_leader_but_only_a_few() -> None:
    world = running(nodes=9)
    silence_leader(world, 1)
    probed = [target.pod for target in world.plan().probe]
    assert len(probed) == 4
    assert "run-0-0" not in probed


# --------------------------------------------------------------------------------------------- members


def test_a_node_that_is_not_ready_changes_nothing_while_steps_advance() -> None:
    """A kubelet that died takes no step away."""
    world = running(nodes=2)
    world.take_down("node-1")
    world.say(newest=summary(11, world.now))
    assert world.plan().status.slots == world.status.slots
    world.now += 6  # no step since
    assert "1" not in world.plan().status.slots


def test_an_operator_that_has_just_started_is_no_witness_of_missing_progress() -> None:
    """A dead kubelet beside a healthy run must not cost a member because the operator was upgraded."""
    world = running(nodes=2)
    world.now += 3600
    world.take_down("node-1")
    world.new_operator()
    assert world.leader is not None
    world.leader = replace(world.leader, connected=False, since=world.now)
    assert world.plan().status.slots == world.status.slots
    world.leader = replace(world.leader, connected=True, since=world.now + 1)
    world.now += 2
    world.say(newest=summary(900, world.now))
    assert world.plan().status.slots == world.status.slots


def test_a_slow_step_is_no_missing_progress() -> None:
    world = running(nodes=2)
    world.say(newest=summary(11, world.now, seconds=20.0))
    world.take_down("node-1")
    world.now += 50
    assert world.plan().status.slots == world.status.slots
    world.now += 15
    assert "1" not in world.plan().status.slots


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"phase": "Failed"}, "PodFailed"),
        ({"deleting": True}, "PodDeleted"),
        ({"waiting": "CrashLoopBackOff", "running": False}, "ContainerCrashLoop"),
    ],
)
def test_a_member_whose_pod_can_not_go_on_is_given_up(change: dict[str, Any], cause: str) -> None:
    world = running(nodes=2)
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], **change)
    world.settle()
    assert world.status.faults[-1].cause == cause
    assert world.status.slots == {"0": "run-0-0", "1": "run-1-1"}
    assert world.status.restarts.pod == 1


def loop(world: World) -> None:
    """The containers of all pods that hold no slot loop."""
    for name, pod in world.pods.items():
        if name not in world.status.slots.values():
            world.pods[name] = replace(
                pod, phase="Running", running=False, waiting="CrashLoopBackOff", message="back-off"
            )


def test_a_job_whose_containers_loop_ends_and_each_round_of_pods_is_charged_once() -> None:
    """What all of them share breaks, a mount say: neither the members nor the pods that come for them stay up."""
    world = running(nodes=4, resilience={"budgets": {"pod": 2}})
    world.auto = False
    for slot in range(4):
        world.pods[f"run-{slot}-0"] = replace(world.pods[f"run-{slot}-0"], running=False, waiting="CrashLoopBackOff")
        world.settle()
    assert (world.status.budgets_used.pod, world.status.restarts.pod) == (1, 4)
    loop(world)
    assert world.settle().again_at == world.now + LOOPING_SECONDS
    assert world.status.budgets_used.pod == 1, "what passes by itself has time for it"
    for used in (2, 3):
        loop(world)
        world.now += LOOPING_SECONDS
        world.settle()
        assert world.status.budgets_used.pod == used
    failed = find_condition(world.status, "Failed")
    assert failed is not None
    assert failed.reason == "PodBudgetExceeded"
    assert "ContainerCrashLoop: back-off" in failed.message


def test_a_job_that_has_never_begun_waits_for_containers_that_loop() -> None:
    """As for all that its pods wait for: startupDeadlineSeconds is there for who wants an end."""
    world = World(make_job(nodes=2), auto=False)
    world.settle()
    loop(world)
    world.now += 3600
    world.settle()
    assert (world.status.budgets_used.pod, world.created) == (0, ["run-0-0", "run-1-0"])
    ready = find_condition(world.status, "Ready")
    assert ready is not None
    assert (ready.reason, ready.message) == ("ContainerWaits", "run-0-0: CrashLoopBackOff. back-off")


def test_a_spare_that_loops_costs_a_job_that_trains_nothing() -> None:
    world = running(nodes=2, spares=1)
    loop(world)
    world.now += 3600
    world.say(newest=summary(900, world.now))
    world.settle()
    assert (world.status.phase, world.status.budgets_used.pod) == ("Running", 0)
    assert world.created == ["run-0-0", "run-1-0", "run-2-0"]


def test_what_the_leader_gives_up_is_given_up_once() -> None:
    world = running(nodes=3)
    assert world.leader is not None
    world.leader = replace(world.leader, replace=replace_request(1, 2))
    world.settle()
    assert world.status.slots == {"0": "run-0-0", "1": "run-1-0", "2": "run-2-1"}
    assert world.status.restarts.pod == 1
    assert world.status.faults[-1].witness == "stream"


def misses(world: World, slot: int) -> None:
    """The leader of the current epoch asks for another pod in this slot, and goes on doing so."""
    assert world.leader is not None
    world.leader = replace(world.leader, replace=replace_request(world.status.epoch, slot))


def test_where_one_member_after_another_does_not_come_a_budget_lasts_for_minutes() -> None:
    """A broken network takes every new pod like the last one: five of them are not to be used up in half a minute."""
    world = running(nodes=3)
    lost_at = []
    while world.status.phase != "Failed":
        misses(world, 2)
        before, world.now = world.status.budgets_used.pod, world.now + 1
        world.settle()
        if world.status.budgets_used.pod > before:
            lost_at.append(world.now)
        assert world.now < START + 600
    between = [later - earlier for earlier, later in pairwise(lost_at)]
    assert between == [10, 20, 40, 80, 120]


def test_a_member_that_comes_late_is_not_given_up_for_having_been_asked_for() -> None:
    world = running(nodes=3)
    misses(world, 2)
    world.settle()
    misses(world, 2)
    world.now += 9
    decided = world.settle()
    assert world.status.slots["2"] == "run-2-1"
    assert decided.again_at == world.now + 1
    world.say(newest=summary(11, world.now))
    assert world.leader is not None
    world.leader = replace(world.leader, replace=None)  # as the link does when training goes on
    world.now += 100
    world.settle()
    assert world.status.slots["2"] == "run-2-1"


def test_members_that_are_lost_together_or_after_a_recovery_are_given_up_at_once() -> None:
    world = running(nodes=4)
    assert world.leader is not None
    world.leader = replace(world.leader, replace=replace_request(1, 2, 3))
    world.settle()
    assert world.status.slots == {"0": "run-0-0", "1": "run-1-0", "2": "run-2-1", "3": "run-3-1"}
    world.leader = replace(
        world.leader, recovered=(Recovered(world.job.uid, Term(2, 1), {}, steps_lost=0, at=world.now),)
    )
    world.say(newest=summary(12, world.now))
    world.settle()
    misses(world, 1)
    world.settle()
    assert world.status.slots["1"] == "run-1-1"
