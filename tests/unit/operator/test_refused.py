"""Pods that a kubelet does not admit: others are made, with patience, and no job ends for it."""

from __future__ import annotations

from dataclasses import replace

from lockstep_operator.plan.losses import REFUSED_SECONDS
from lockstep_operator.plan.nodes import jobwide
from lockstep_operator.plan.status import find_condition
from unit.operator.builders import World, make_job

WHY = "UnexpectedAdmissionError: Pod was rejected: Allocate failed due to no healthy devices present"


def refuse(world: World, name: str) -> None:
    """The kubelet of the pod's node says no."""
    node = world.schedule(world.pods[name].ordinal)
    world.pods[name] = replace(
        world.pods[name], phase="Failed", running=False, address="", node=node, refused=WHY, message=WHY
    )


def starting() -> World:
    """A job of two nodes whose first pod starts as pods do."""
    world = World(make_job(nodes=2), auto=False)
    world.settle()
    return world


def test_the_next_pod_comes_after_a_time_and_the_job_says_what_it_waits_for() -> None:
    world = starting()
    refuse(world, "run-1-0")
    world.now += REFUSED_SECONDS - 1
    decided = world.settle()
    assert set(world.pods) == {"run-0-0", "run-1-0"}
    assert decided.again_at == world.now + 1
    ready = find_condition(world.status, "Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "PodRefused")
    assert ready.message == f"run-1-0 was refused by the kubelet of node-1: {WHY}"

    world.now += 1
    world.settle()
    assert set(world.pods) == {"run-0-0", "run-1-1"}
    said = [(one.type, one.reason, one.message) for one in world.events if one.reason == "PodRefused"]
    assert said == [("Warning", "PodRefused", f"run-1-0 on node-1 is given up: {WHY}")]


def test_nothing_is_counted_where_nothing_ran() -> None:
    """A device plugin that restarts refuses pods for a minute: more of them than a budget has."""
    world = starting()
    for number in range(20):
        refuse(world, f"run-1-{number}")
        world.now += REFUSED_SECONDS
        world.settle()
    assert not world.status.phase.terminal  # type: ignore[union-attr]
    assert (world.status.budgets_used.pod, world.status.restarts.total, world.status.faults) == (0, 0, [])
    world.auto = True
    world.run_pods()
    world.train(step=1)
    assert world.status.slots == {"0": "run-0-0", "1": "run-1-20"}


def test_the_next_pod_goes_elsewhere_if_it_can() -> None:
    world = starting()
    refuse(world, "run-1-0")
    assert jobwide.avoided(world.status, world.observed(), world.now) == ("node-1",)
    world.now += REFUSED_SECONDS
    (new,) = world.plan().create
    assert (new.name, new.avoid_nodes, new.exclude_nodes) == ("run-1-1", ("node-1",), ())


def test_a_member_that_waits_for_another_pod_keeps_its_epoch() -> None:
    """The others go on waiting for a place that the cluster has; what was lost before costs what it always does."""
    world = World(make_job(nodes=2))
    world.train(step=10)
    world.auto = False
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], phase="Failed", running=False, message="Evicted: memory")
    world.settle()
    assert world.status.faults[-1].message == "Evicted: memory"
    refuse(world, "run-1-1")
    world.now += REFUSED_SECONDS
    world.settle()
    assert "run-1-2" in world.pods
    assert (world.status.budgets_used.pod, world.status.restarts.pod, len(world.status.faults)) == (1, 1, 1)
