"""A node that fails its preflight checks gets no slot: its pod is replaced elsewhere, and what they found is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockstep_api import constants
from lockstep_operator.cache import trim_pod
from lockstep_operator.plan import pods
from lockstep_operator.plan.actions import NewPod
from unit.operator.builders import World, fault, make_job, summary

FOUND = "GPU 0 (serial 1650): a row of its memory waits to be replaced [gpu.remap-pending]; reset the GPU"


def starting(spares: int = 0, **spec: Any) -> World:
    """Pods are made and scheduled, and no agent has answered yet."""
    world = World(make_job(nodes=2, spares=spares, **spec))
    world.step()
    return world


def fails(world: World, name: str, *, running: bool = False) -> None:
    """The container ends with what the checks found; ``running``: it has been started again since."""
    pod = world.pods[name]
    world.pods[name] = replace(pod, unfit=FOUND, running=running, waiting="" if running else "CrashLoopBackOff")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_node_that_fails_never_gets_a_slot_and_is_left_for_another(restarted: bool) -> None:
    world = starting()
    fails(world, "run-1-0", running=restarted)
    given: set[str] = set()
    for _ in range(6):
        world.step()
        given |= set(world.status.slots.values())
    assert given == {"run-0-0", "run-1-1"}
    assert "run-1-0" in world.deleted
    assert world.pods["run-1-1"].node != "node-1"
    assert [one.node for one in world.status.excluded_nodes] == ["node-1"]
    (known,) = world.status.faults
    assert (known.cause, known.node, known.witness) == ("PreflightFailed", "node-1", "preflight")
    assert known.message == FOUND
    (event,) = [event for event in world.events if event.reason == "PreflightFailed"]
    assert FOUND in event.message
    assert event.type == "Warning"


def test_a_large_cluster_has_some_unfit_nodes_and_a_job_that_meets_them_loses_no_budget() -> None:
    world = World(make_job(nodes=4, resilience={"budgets": {"pod": 0}}))
    world.step()
    for ordinal in range(3):
        fails(world, f"run-{ordinal}-0")
    world.settle()
    assert world.status.phase != "Failed"
    assert world.status.budgets_used.pod == 0
    assert len(world.status.slots) == 4


@pytest.mark.parametrize(("limit", "most"), [(4, 5), (0, 0), (7, 7)])
def test_of_a_large_jobs_nodes_a_share_may_be_unfit(limit: int, most: int) -> None:
    """2 % of 256 nodes are 5. Who wants none to be excluded gets none."""
    world = World(make_job(nodes=256, resilience={"budgets": {"pod": 100}, "nodes": {"excludePerHour": limit}}))
    world.step()
    for ordinal in range(8):
        fails(world, f"run-{ordinal}-0")
        world.now += 1
        world.step()
    assert len(world.status.excluded_nodes) == most
    held = [event.message for event in world.events if event.reason == "NodeExclusionHeld"]
    assert ("2 % of the job's nodes (5) were" in held[0]) == (limit == 4)


def test_all_nodes_of_a_rack_that_is_unfit_are_excluded_at_once() -> None:
    """More of them than the record of faults keeps otherwise: on those that are forgotten the next pods would fail."""
    world = World(make_job(nodes=2048, resilience={"budgets": {"pod": 0}}))
    world.step()
    rack = [f"node-{ordinal}" for ordinal in range(40)]
    for ordinal in range(40):
        fails(world, f"run-{ordinal}-0")
    world.step()
    assert sorted(one.node for one in world.status.excluded_nodes) == sorted(rack)
    assert world.status.phase != "Failed"
    assert world.status.budgets_used.pod == 0
    world.now += 300
    fails(world, "run-40-0")
    world.step()
    assert [one.node for one in world.status.faults[-2:]] == ["node-39", "node-40"]
    assert len(world.status.faults) == 10, "the last ten stay"


def test_where_every_node_fails_the_job_ends_with_what_was_found() -> None:
    """What they share is at fault: an image, a driver, the template. The breaker holds further exclusions."""
    world = World(make_job(nodes=2, resilience={"budgets": {"pod": 3}, "nodes": {"excludePerHour": 2}}))
    for _ in range(20):
        world.step()
        for name, pod in list(world.pods.items()):
            if pod.running:
                fails(world, name)
    failed = next(one for one in world.status.conditions if one.type == "Failed")
    assert failed.reason == "PodBudgetExceeded"
    assert FOUND in failed.message
    assert len(world.status.excluded_nodes) == 2


def test_a_member_whose_restarted_container_finds_its_node_unfit_is_given_up_at_once() -> None:
    world = World(make_job(nodes=2, spares=1))
    world.train(step=10)
    fails(world, "run-1-0")
    world.step()
    assert world.status.faults[-1].cause == "PreflightFailed"
    world.settle()
    assert world.status.slots["1"] == "run-2-0"


def test_a_member_that_failed_once_and_passed_when_it_was_started_again_stays() -> None:
    """Nobody saw it fail: the operator was away."""
    world = World(make_job(nodes=2))
    world.train(step=10)
    fails(world, "run-1-0", running=True)
    world.say(newest=summary(11, world.now))
    world.settle()
    assert world.status.slots["1"] == "run-1-0"
    assert world.status.faults == []


# ------------------------------------------------------------------------------------ a node's first use by the job

FULL: dict[str, Any] = {"resilience": {"preflight": "Full"}}


def checks(world: World, name: str) -> tuple[str, ...]:
    """Gives the pod up as somebody deleted it; nodes on which its successor need not do the full checks."""
    del world.pods[name]
    (new,) = world.step().create
    return new.checked_nodes


def test_full_checks_are_done_at_the_first_use_of_a_node() -> None:
    world = World(make_job(nodes=2, **FULL))
    assert all(new.checked_nodes == () for new in world.step().create)
    world.train(step=10)
    assert world.status.checked_nodes == ["node-0", "node-1"]
    world.now += 60
    assert checks(world, "run-1-0") == ("node-0", "node-1")  # a deleted pod speaks against no node


def test_a_fault_that_speaks_against_a_node_has_it_checked_again_and_a_pod_that_passes_ends_that() -> None:
    world = World(make_job(nodes=2, **FULL))
    world.train(step=10)
    world.now += 60
    assert world.leader is not None
    stuck = fault(1, 1, cause="Hang", rung="process", slot=1, at=world.now)
    world.leader = replace(world.leader, faults=(stuck,))
    world.step()
    assert world.status.checked_nodes == ["node-0"]  # though its pod still answers
    world.settle()
    assert world.status.checked_nodes == ["node-0"]
    world.now += 60
    assert checks(world, "run-1-0") == ("node-0",)
    world.settle()
    assert world.status.checked_nodes == ["node-0", world.pods["run-1-1"].node]


def test_quick_checks_remember_nothing() -> None:
    world = World(make_job(nodes=2))
    world.train(step=10)
    assert world.status.checked_nodes == []


def test_more_nodes_than_fit_into_a_variable_are_left_out() -> None:
    nodes = tuple(f"node-{number:05}.a-long-domain.example" for number in range(5000))
    pod = pods.render(make_job(), NewPod("run-0-0", 0, 0, checked_nodes=nodes), pods.PodDefaults())
    (value,) = (one["value"] for one in pod["spec"]["containers"][0]["env"] if one["name"] == "LOCKSTEP_CHECKED_NODES")
    assert len(value) < 128 * 1024
    assert set(value.split(",")) < set(nodes)


# ------------------------------------------------------------------------------------------- what the kubelet says


def told(**states: Any) -> str:
    """Pod.unfit of a pod whose container is in these states."""
    container = {"name": constants.CONTAINER_NAME, "restartCount": 1, **states}
    metadata = {"name": "run-0-0", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    labels = {constants.LABEL_JOB_UID: "job"}
    status = {"phase": "Running", "containerStatuses": [container]}
    return trim_pod({"metadata": {**metadata, "labels": labels}, "status": status})[1].unfit


def test_the_containers_last_words_are_read_from_now_and_before() -> None:
    ended = {"terminated": {"exitCode": constants.PREFLIGHT_EXIT_CODE, "message": f"{FOUND}\n"}}
    assert told(state=ended) == FOUND
    assert told(state={"waiting": {"reason": "CrashLoopBackOff"}}, lastState=ended) == FOUND
    assert told(state={"running": {}}, lastState={"terminated": {"exitCode": 1, "message": "else"}}) == ""
    assert told(state={"terminated": {"exitCode": constants.PREFLIGHT_EXIT_CODE}}) == "its preflight checks failed"


def test_the_agent_knows_where_its_last_words_go() -> None:
    def path(**container: Any) -> str:
        template = {"spec": {"containers": [{"name": constants.CONTAINER_NAME, **container}]}}
        pod = pods.render(make_job(template=template), NewPod("run-0-0", 0, 0), pods.PodDefaults())
        variables = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
        return str(variables["LOCKSTEP_TERMINATION_LOG"])

    assert path() == "/dev/termination-log"
    assert path(terminationMessagePath="/tmp/last-words") == "/tmp/last-words"
