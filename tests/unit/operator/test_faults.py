"""Who is given up, on whose word, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from lockstep_api.messages import FaultAck, Recovered, Term
from lockstep_operator.plan.nodes import jobwide
from lockstep_operator.plan.observed import Agent, Node
from unit.operator.builders import (
    START,
    World,
    durable,
    fault,
    finished,
    inventory,
    make_job,
    replace_request,
    summary,
)


def running(nodes: int = 3, spares: int = 0, **spec: Any) -> World:
    world = World(make_job(nodes=nodes, spares=spares, **spec))
    world.train(step=10)
    return world


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


# -------------------------------------------------------------------------------------- reports, counters


def test_a_report_counts_once_however_often_it_is_sent() -> None:
    world = running()
    assert world.leader is not None
    world.leader = replace(world.leader, faults=(fault(1, 1),))
    for _ in range(3):
        world.step()
    assert world.status.restarts.process == 1
    assert world.status.restarts.total == 1
    assert world.status.fault_cursor == "1/1"


def test_a_report_is_acknowledged_only_after_it_is_written() -> None:
    """An acknowledgement before the write would lose the fault if the operator died in between."""
    world = running()
    assert world.leader is not None
    world.leader = replace(world.leader, faults=(fault(1, 1),))
    assert not any(isinstance(message, FaultAck) for message in world.plan().send)
    world.step()
    assert FaultAck("6f0c-uid", Term(1, 1)) in world.plan().send


def test_an_operator_that_dies_before_the_write_counts_the_fault_when_it_is_back() -> None:
    world = running()
    assert world.leader is not None
    report = fault(1, 1)
    world.leader = replace(world.leader, faults=(report,))
    world.plan()  # and dies
    world.new_operator()
    world.leader = replace(world.leader, faults=(report,))
    world.step()
    world.new_operator()
    world.leader = replace(world.leader, faults=(report,))  # the acknowledgement was lost: it is sent again
    world.step()
    assert world.status.restarts.process == 1


def test_the_ten_newest_faults_are_kept_with_the_last_words_of_the_worker() -> None:
    world = running(resilience={"budgets": {"pod": 5, "process": 100}})
    assert world.leader is not None
    reports = tuple(fault(1, number, log_tail=(f"line {number}",)) for number in range(1, 13))
    world.leader = replace(world.leader, faults=reports)
    world.step()
    assert [kept.log_tail for kept in world.status.faults] == [[f"line {number}"] for number in range(3, 13)]
    assert world.status.restarts.process == 12
    assert world.status.faults[-1].pod == "run-1-0"
    assert world.status.faults[-1].node == "node-1"


def test_the_leaders_and_the_operators_record_of_one_loss_become_one() -> None:
    world = running(nodes=3)
    assert world.leader is not None
    lost = fault(
        1, 1, rung="pod", cause="MemberLost", witness="stream", log_tail=("Killed",), exit_code=None, rank=None
    )
    world.leader = replace(world.leader, faults=(lost,), replace=replace_request(1, 1))
    world.settle()
    (kept,) = world.status.faults
    assert kept.log_tail == ["Killed"]
    assert kept.node == "node-1"
    assert world.status.restarts.total == 1


def test_what_a_pod_went_through_before_it_was_lost_stays_a_record_of_its_own() -> None:
    """The fault matrix found it: a worker that ran out of memory, and its pod's node cut off later in the epoch."""
    world = running(nodes=3)
    assert world.leader is not None
    world.leader = replace(
        world.leader,
        faults=(fault(1, 1, detect_seconds=0.1),),
        recovered=(Recovered("6f0c-uid", Term(1, 2), {"restart": 0.5}, steps_lost=3, at=START),),
    )
    world.step()
    world.leader = replace(world.leader, replace=replace_request(1, 1))
    world.settle()
    mended, lost = world.status.faults
    assert (mended.cause, mended.rung, mended.exit_code, mended.steps_lost) == ("WorkerExited", "process", -9, 3)
    assert (lost.cause, lost.rung, lost.exit_code) == ("MemberLost", "pod", None)
    assert world.status.restarts.total == 2


def test_a_recovery_tells_what_the_newest_fault_cost() -> None:
    world = running()
    assert world.leader is not None
    recovered = Recovered("6f0c-uid", Term(1, 2), {"restart": 0.5, "restore": 1.5}, steps_lost=3, at=START)
    world.leader = replace(world.leader, faults=(fault(1, 1, detect_seconds=0.1),), recovered=(recovered,))
    for _ in range(2):
        world.step()
    (kept,) = world.status.faults
    assert kept.seconds == {"detect": 0.1, "restart": 0.5, "restore": 1.5}
    assert kept.steps_lost == 3


# ---------------------------------------------------------------------------------------------- budgets


def lose_pods(world: World, count: int) -> None:
    for _ in range(count):
        world.now += 1
        del world.pods[world.status.slots["1"]]
        world.settle()


def test_the_pod_budget_ends_the_job_with_the_cause() -> None:
    world = running(nodes=2, resilience={"budgets": {"pod": 2}})
    lose_pods(world, 2)
    assert world.status.phase != "Failed"
    lose_pods(world, 1)
    assert world.status.phase == "Failed"
    failed = next(one for one in world.status.conditions if one.type == "Failed")
    assert failed.reason == "PodBudgetExceeded"
    assert "3 pods were lost" in failed.message
    assert "resilience.budgets.pod is 2" in failed.message


def test_a_checkpoint_newer_than_the_fault_fills_the_budget() -> None:
    world = running(nodes=2, resilience={"budgets": {"pod": 2}})
    lose_pods(world, 2)
    world.say(newest=summary(12, world.now), **durable(step=12, at=world.now + 1, epoch=3))
    world.settle()
    assert world.status.budgets_used.pod == 0
    lose_pods(world, 2)
    assert world.status.phase != "Failed"
    assert world.status.restarts.pod == 4


def test_a_checkpoint_from_before_the_fault_does_not() -> None:
    world = running(nodes=2)
    lose_pods(world, 1)
    world.say(newest=summary(12, world.now), **durable(step=12, at=world.now - 60, epoch=1))
    world.settle()
    assert world.status.budgets_used.pod == 1


def test_a_loss_names_the_generation_that_it_ended() -> None:
    """Also the leader's own: a recovery is matched to the newest fault before its term."""
    world = running(nodes=2)
    world.say(newest=summary(12, world.now), term=Term(1, 4))
    world.now += 2
    del world.pods["run-0-0"]
    world.step()
    (kept,) = world.status.faults
    assert (kept.epoch, kept.generation, kept.seconds) == (1, 4, {"detect": 2.0})
