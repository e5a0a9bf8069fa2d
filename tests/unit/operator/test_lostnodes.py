"""Nodes that go down, are drained or declared off: what becomes of the pods on them, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep_operator.plan.nodes import jobwide
from lockstep_operator.plan.observed import Node
from unit.operator.builders import World, finished, make_job, replace_request, running


def test_pods_on_a_lost_node_never_block_the_recovery() -> None:
    """The old pod hangs in Terminating until its node is known to be down; the new one has another name."""
    world = running(nodes=2)
    world.take_down("node-1")
    world.now += 30
    world.settle()
    assert world.status.slots["1"] == "run-1-1"
    assert world.forced == []  # the kubelet may come back in a moment and end it in order
    assert world.plan().again_at is not None
    world.now += 60
    world.settle()
    assert world.forced == ["run-1-0"]


@pytest.mark.parametrize("ended", [False, True])
def test_no_job_waits_in_terminating(ended: bool) -> None:
    """Pods that somebody else deleted on a dead node, of a job that goes on and of one that is over."""
    world = running(nodes=2)
    if ended:
        assert world.leader is not None
        world.leader = replace(world.leader, finished=finished(1))
    world.take_down("node-1")
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], deleting=True, deleted_at=world.now)
    world.now += 59
    world.settle()
    assert world.forced == []
    world.now += 1
    world.settle()
    assert world.forced == ["run-1-0"]


def test_how_long_a_dead_pod_may_hang_is_the_jobs_choice() -> None:
    world = running(nodes=2, resilience={"nodes": {"forceDeleteAfterSeconds": 5}})
    world.take_down("node-1")
    world.now += 30
    world.settle()
    world.now += 5
    world.settle()
    assert world.forced == ["run-1-0"]


def test_a_pod_on_a_healthy_node_is_never_forced_however_long_it_takes() -> None:
    world = running(nodes=2)
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], deleting=True, deleted_at=world.now)
    world.now += 3600
    world.settle()
    assert world.forced == []


def test_force_is_used_only_where_nobody_is_there_to_confirm() -> None:
    world = running(nodes=2)
    assert world.leader is not None
    world.leader = replace(world.leader, replace=replace_request(1, 1))
    world.settle()
    assert world.deleted == ["run-1-0"]
    assert world.forced == []


def test_a_node_that_an_administrator_declares_off_is_down() -> None:
    world = running(nodes=2)
    world.nodes["node-1"] = Node("node-1", ready=True, out_of_service=True)
    world.now += 30
    world.settle()
    assert world.forced == ["run-1-0"]


def test_new_pods_stay_away_from_a_node_that_was_lost_lately() -> None:
    world = running(nodes=2)
    assert world.leader is not None
    world.leader = replace(world.leader, replace=replace_request(1, 1))
    (new,) = world.step().create
    assert new.avoid_nodes == ("node-1",)
    assert jobwide.avoided(world.status, world.observed(), world.now + 601) == ()


def with_a_silent_member() -> World:
    """The member on node-1 was replaced by a pod on node-9."""
    world = running(nodes=2)
    assert world.leader is not None
    world.leader = replace(world.leader, replace=replace_request(1, 1))
    world.settle()
    world.pods["run-1-1"] = replace(world.pods["run-1-1"], node="node-9")
    world.nodes["node-9"] = Node("node-9")
    return world


@pytest.mark.parametrize(
    ("node", "cause"),
    [
        (Node("node-1", ready=False), "NodeLost"),
        (None, "NodeLost"),  # its machine was taken away with it
        (Node("node-1", ready=False, cordoned=True), "MemberLost"),  # somebody works on it
        (Node("node-1"), "MemberLost"),  # it was not the node
    ],
)
def test_a_member_that_fell_silent_with_its_node_is_a_lost_node(node: Node | None, cause: str) -> None:
    """The stream closes within seconds, the node's condition follows after 50: only together do they blame the node."""
    world = with_a_silent_member()
    world.now += 45
    if node:
        world.nodes["node-1"] = node
    else:
        del world.nodes["node-1"]
    world.settle()
    (known,) = world.status.faults
    assert known.cause == cause
    assert known.node == "node-1"


def test_a_node_that_goes_down_much_later_is_another_matter() -> None:
    world = with_a_silent_member()
    world.now += 601
    world.take_down("node-1")
    world.settle()
    assert [fault.cause for fault in world.status.faults] == ["MemberLost"]


def test_a_drained_member_is_told_apart_from_a_deleted_one() -> None:
    world = running(nodes=2)
    world.nodes["node-1"] = Node("node-1", cordoned=True)
    pod = world.pods["run-1-0"]
    world.pods["run-1-0"] = replace(pod, deleting=True, deleted_at=world.now, disruption="EvictionByEvictionAPI")
    world.settle()
    (known,) = world.status.faults
    assert (known.cause, known.message) == ("NodeDrained", "EvictionByEvictionAPI")
    assert (world.status.budgets_used.pod, world.status.restarts.pod) == (0, 1)  # maintenance ends no job
    assert jobwide.avoided(world.status, world.observed(), world.now) == ()


def test_a_starting_pod_on_a_node_that_goes_down_is_replaced_without_a_charge() -> None:
    world = World(make_job(nodes=2), auto=False)
    world.step()
    world.run_pods()
    world.take_down("node-1")
    world.step()
    assert "run-1-1" in world.created
    assert world.status.budgets_used.pod == 0
