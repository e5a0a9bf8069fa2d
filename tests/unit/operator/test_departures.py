"""Leaving a node before it goes, and an unhealthy GPU: the other pod first, then the checkpoint, then the slot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep_api.messages import Stop
from lockstep_api.v1alpha1 import ExcludedNode
from lockstep_operator.plan.departures import departures
from lockstep_operator.plan.nodes.blame import told_by
from lockstep_operator.plan.nodes.jobwide import avoided, excluded
from lockstep_operator.plan.nodes.score import THRESHOLD
from lockstep_operator.plan.observed import Node, Observed, Pod
from lockstep_operator.plan.times import rfc3339
from unit.operator.builders import START, World, fault, finished, make_job, replace_request, running, summary

SPOT = Node("node-1", leaving="spot interruption (taint aws-node-termination-handler/spot-itn)")


def stops(world: World) -> list[Stop]:
    return [message for message in world.sent if isinstance(message, Stop)]


def the_leader_has_stopped(world: World) -> None:
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(world.status.epoch, "stopped", "Stopped"))


def test_a_spot_notice_moves_the_slot_to_the_spare_after_a_last_checkpoint() -> None:
    world = running(nodes=2, spares=1)
    world.nodes["node-1"] = SPOT
    world.settle()
    assert world.status.slots["1"] == "run-1-0"  # steps go on until the leader has its checkpoint
    assert world.status.phase == "Running"
    assert "spot interruption" in stops(world)[0].reason
    assert 0 < stops(world)[0].seconds <= 25  # notice is 30 s on two of three clouds

    the_leader_has_stopped(world)
    world.settle()
    assert world.status.slots["1"] == "run-2-0"
    (known,) = world.status.faults
    assert (known.cause, known.rung, known.node, known.witness) == ("NodeLeaving", "spare", "node-1", "taint")
    assert "run-1-0" in world.deleted
    assert world.status.excluded_nodes == []  # it was no fault of the node's


def test_without_a_spare_the_other_pod_is_made_ready_before_anything_stops() -> None:
    world = running(nodes=2)
    world.auto = False
    world.nodes["node-1"] = SPOT
    world.settle()
    assert world.created[-1] == "run-2-0"
    assert stops(world) == []
    assert world.deleted == []
    world.auto = True
    world.run_pods()
    world.settle()
    assert stops(world) != []
    the_leader_has_stopped(world)
    world.settle()
    assert world.status.slots == {"0": "run-0-0", "1": "run-2-0"}
    assert set(world.pods) == {"run-0-0", "run-2-0"}


def test_the_other_pods_imports_are_loaded_before_anything_stops() -> None:
    world = running(nodes=2)
    world.auto = False
    world.nodes["node-1"] = SPOT
    world.settle()
    world.run_pods()
    for warm in (False, True):
        world.answers("run-2-0", warm=warm)
        world.settle()
        assert bool(stops(world)) == warm


def test_a_vacant_slot_does_not_wait_for_imports_and_prefers_who_has_them() -> None:
    world = running(nodes=2, spares=2)
    world.auto = False
    world.answers("run-2-0", warm=False)
    world.answers("run-3-0")
    lost = world.pods.pop("run-1-0")
    del world.agents[lost.uid]
    world.settle()
    assert world.status.slots["1"] == "run-3-0"
    del world.pods["run-3-0"]
    world.answers("run-2-0", warm=False)
    world.settle()
    assert world.status.slots["1"] == "run-2-0"


def test_a_job_that_saves_its_last_step_is_not_stopped() -> None:
    world = running(nodes=2, spares=1)
    world.say(newest=summary(100, world.now), state="finishing")
    world.nodes["node-1"] = SPOT
    world.settle()
    assert stops(world) == []
    assert world.status.slots["1"] == "run-1-0"


def test_a_notice_that_is_withdrawn_takes_the_extra_pod_back() -> None:
    world = running(nodes=2)
    world.auto = False
    world.nodes["node-1"] = SPOT
    world.settle()
    world.nodes["node-1"] = Node("node-1")
    world.settle()
    assert world.deleted == ["run-2-0"]
    assert world.status.slots["1"] == "run-1-0"


def test_where_no_step_is_made_no_checkpoint_is_asked_for() -> None:
    world = running(nodes=2, spares=1)
    world.now += 10
    world.nodes["node-1"] = SPOT
    world.settle()
    assert world.status.slots["1"] == "run-2-0"
    assert world.status.faults[-1].cause == "NodeLeaving"


def test_a_leaving_node_is_not_left_for_nothing() -> None:
    """Where no other pod comes up the job goes on as long as it can: giving up would only end it sooner."""
    world = running(nodes=2)
    world.auto = False
    world.nodes["node-1"] = SPOT
    for _ in range(20):
        world.now += 60
        world.settle()
    assert world.status.slots["1"] == "run-1-0"
    assert world.status.budgets_used.pod == 0
    assert world.created == ["run-0-0", "run-1-0", "run-2-0"]


def test_a_template_that_tolerates_every_taint_makes_no_storm_of_pods() -> None:
    """Its new pods come to the very node that is to be left, again and again."""
    world = running(nodes=2, spares=1)
    world.nodes |= {name: replace(SPOT, name=name) for name in ("node-1", "node-2")}
    world.excluded = frozenset({"node-2"})
    world.usable = lambda node: not node.down  # type: ignore[method-assign]
    before = len(world.created)
    for _ in range(300):  # five minutes, a plan a second
        world.now += 1
        world.say(newest=summary(int(world.now), world.now))
        world.step()
    assert len(world.created) - before <= 6
    assert world.status.slots["1"] == "run-1-0"


def test_a_spare_on_a_leaving_node_is_replaced_without_a_charge() -> None:
    world = running(nodes=2, spares=1)
    world.nodes["node-2"] = replace(SPOT, name="node-2")
    world.now += 60
    world.say(newest=summary(11, world.now))
    world.step()
    assert world.status.faults == []
    assert world.status.incarnations == {"2": 1}
    assert stops(world) == []


def test_a_node_that_is_only_cordoned_is_not_left() -> None:
    world = running(nodes=2, spares=1)
    world.nodes["node-1"] = Node("node-1", cordoned=True)
    before = world.status
    world.settle()
    assert (world.status.slots, stops(world)) == (before.slots, [])


@pytest.mark.parametrize(
    ("node", "device", "leaves"),
    [
        (Node("node-1", gpus=8, gpus_healthy=8), "", False),
        (Node("node-1", gpus=8, gpus_healthy=7), "", False),  # another pod's, perhaps: this one has two of eight
        (Node("node-1", gpus=8, gpus_healthy=7), "GPU-5", True),  # the kubelet says whose
        (Node("node-1", gpus=2, gpus_healthy=1), "", True),  # the pod has both
        (Node("node-1", gpus=2, gpus_healthy=0), "", False),  # a device plugin that restarts has none for a moment
        (Node("node-1"), "", False),  # devices that are not GPUs by name
    ],
)
def test_an_unhealthy_gpu_is_left_where_it_is_known_to_be_the_pods_own(node: Node, device: str, leaves: bool) -> None:
    world = running(nodes=2, spares=1)
    world.nodes["node-1"] = node
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], bad_device=device)
    world.settle()
    assert bool(stops(world)) is leaves
    if not leaves:
        return
    the_leader_has_stopped(world)
    world.settle()
    assert world.status.slots["1"] == "run-2-0"
    assert [one.node for one in world.status.excluded_nodes] == ["node-1"]


def test_the_pod_that_is_made_ready_does_not_come_to_the_node_that_is_left() -> None:
    """A node with a sick GPU may have a healthy one to spare."""
    world = running(nodes=2)
    world.nodes["node-1"] = Node("node-1", gpus=8, gpus_healthy=7)
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], bad_device="GPU-5")
    (new,) = world.step().create
    assert new.exclude_nodes == ("node-1",)


def test_where_a_sick_gpu_has_stopped_the_steps_no_other_pod_is_waited_for() -> None:
    world = running(nodes=2)
    world.nodes["node-1"] = Node("node-1", gpus=2, gpus_healthy=1)
    world.now += 6
    world.step()
    (known,) = world.status.faults
    assert (known.cause, known.witness) == ("GpuUnhealthy", "devicePlugin")


def test_a_device_plugin_that_restarts_during_a_long_start_is_no_fault() -> None:
    """A first step takes half an hour, and for the cluster no step is made meanwhile."""
    world = World(make_job(nodes=2))
    world.settle()
    world.say(state="starting")
    world.now += 600
    world.nodes["node-1"] = Node("node-1", gpus=2, gpus_healthy=0)
    world.settle()
    assert world.status.faults == []
    assert world.status.slots["1"] == "run-1-0"


# --------------------------------------------------------------------------- nodes that new pods stay away from


def test_a_node_that_a_rule_named_gets_no_new_pod_of_the_job_for_a_day() -> None:
    world = running(nodes=2)
    assert world.leader is not None

    named = fault(1, 1, rung="pod", blame="Named", at=world.now)
    world.leader = replace(world.leader, faults=(named,), replace=replace_request(1, 1, cause="WorkerExited"))
    decided = world.step()
    (new,) = decided.create
    assert new.exclude_nodes == ("node-1",)
    assert "node-1" not in new.avoid_nodes
    (event,) = [event for event in decided.events if event.reason == "NodeExcluded"]
    assert "node-1" in event.message
    world.now += 86_400
    world.say(newest=summary(11, world.now))
    world.step()
    assert world.status.excluded_nodes == []


def test_a_rank_that_computes_wrong_numbers_costs_its_node_the_job_and_a_hard_word_across_jobs() -> None:
    world = running(nodes=2)
    assert world.leader is not None
    why = "unit 1 was outvoted at step 9"
    named = fault(1, 1, cause="Corruption", witness="arbiter", rung="pod", blame="Named", message=why, at=world.now)
    request = replace_request(1, 1, cause="Corruption")
    world.leader = replace(world.leader, faults=(named,), replace=request)
    decided = world.step()
    (new,) = decided.create
    assert new.exclude_nodes == ("node-1",)
    (told,) = [one for one in world.status.faults if one.cause == "Corruption"]
    assert (told.node, told.message) == ("node-1", why)
    assert [(one.node, one.reason) for one in world.status.excluded_nodes] == [("node-1", "Corruption")]
    (remembered,) = told_by(world.job)["node-1"]
    assert (remembered.weight, remembered.hard) == (THRESHOLD, True)


def test_where_there_is_no_other_node_a_pod_stays_on_an_excluded_one() -> None:
    """On a single machine each new pod would be given up for the next one."""
    job = make_job(nodes=1)
    named = ExcludedNode(node="local", since=rfc3339(START), until=rfc3339(START + 60), reason="Corruption")
    status = job.status.model_copy(update={"excluded_nodes": [named]})
    pod = Pod("run-0-1", "uid", 0, 1, "Running", START, node="local", running=True)
    status = status.model_copy(update={"incarnations": {"0": 1}})
    assert not departures(job, status, Observed((pod,)), START)
    two = Observed((pod,), {name: Node(name) for name in ("local", "other")})
    assert [why.cause for why in departures(job, status, two, START).values()] == ["NodeExcluded"]


def test_a_job_that_names_many_nodes_is_stopped_by_its_breaker() -> None:

    world = World(make_job(nodes=4, resilience={"nodes": {"excludePerHour": 2}}))
    world.train(step=10)
    for slot in range(1, 4):
        assert world.leader is not None
        epoch = world.status.epoch
        named = fault(epoch, 1, slot=slot, rung="pod", blame="Named", at=world.now)
        request = replace_request(epoch, slot, cause="WorkerExited")
        world.leader = replace(world.leader, faults=(named,), replace=request)
        world.settle()
        world.now += 60
        world.say(newest=summary(10 + slot, world.now))
        world.settle()
    assert [one.node for one in world.status.excluded_nodes] == ["node-1", "node-2"]
    held = [event for event in world.events if event.reason == "NodeExclusionHeld"]
    assert len(held) == 1
    assert "node-3" in held[0].message
    assert "resilience.nodes.excludePerHour (2)" in held[0].message


def test_all_jobs_stay_away_from_what_is_excluded_for_all() -> None:
    world = World(make_job(nodes=2), excluded=frozenset({"lemon"}))
    assert {new.exclude_nodes for new in world.step().create} == {("lemon",)}


def test_a_job_that_waits_says_which_nodes_it_may_not_use() -> None:
    world = World(make_job(nodes=2), auto=False, excluded=frozenset({"lemon"}))
    world.settle()
    (ready,) = [one for one in world.status.conditions if one.type == "Ready"]
    assert "excluded nodes: lemon" in ready.message


def test_a_spare_on_an_excluded_node_is_moved_and_a_member_is_not() -> None:
    world = running(nodes=2, spares=1)
    world.excluded = frozenset({"node-1", "node-2"})
    world.now += 60
    world.say(newest=summary(11, world.now))
    world.step()
    assert world.status.slots["1"] == "run-1-0"
    assert world.status.incarnations == {"2": 1}


def test_nodes_that_others_find_at_fault_are_avoided_where_possible() -> None:
    world = running(nodes=2)
    world.nodes["npd"] = Node("npd", sick="KernelDeadlock")
    assert avoided(world.status, world.observed(), world.now) == ("npd",)
    assert excluded(world.status, world.observed()) == ()
