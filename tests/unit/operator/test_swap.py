"""A slow node is left in time: the other pod first, then a step whose state is kept, then the slot; and its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockstep_api import constants
from lockstep_api.messages import SlowVerdict, Stop
from lockstep_api.v1alpha1 import Condition, ExcludedNode
from lockstep_cli.explain import why
from lockstep_operator.plan import swap
from lockstep_operator.plan.nodes.blame import remember
from lockstep_operator.plan.nodes.exclusion import Limits, decide
from lockstep_operator.plan.observed import Node
from lockstep_operator.plan.times import rfc3339
from lockstep_trainer.stragglers.work import Cause
from unit.operator.builders import START, World, finished, make_job, summary

TRAINER = {
    "model": {"preset": "llama-debug"},
    "data": {"sources": [{"uri": "file:///x"}], "sequenceLength": 32},
    "recipe": {"steps": 1000, "globalBatchTokens": 65_536},
}


def running(nodes: int = 4, spares: int = 1, action: str = "Swap", **resilience: Any) -> World:
    stragglers = {"action": action, **resilience.pop("stragglers", {})}
    world = World(
        make_job(
            nodes=nodes,
            spares=spares,
            command=None,
            trainer=TRAINER,
            checkpoint={"uri": "file:///ck"},
            resilience={"stragglers": stragglers, **resilience},
        )
    )
    world.train(step=10)
    return world


def verdict(world: World, slot: int = 1, **fields: Any) -> SlowVerdict:
    """The second rank of that slot is slow."""
    defaults: dict[str, Any] = {
        "cause": "Compute",
        "ranks": (2 * slot + 1,),
        "nodes": (world.pod_of(slot).node,),
        "since": 5,
        "slowdown": 0.3,
        "cost": 0.2,
        "evidence": "the product takes 1.3 times as long as its peers'.",
        "at": world.now,
    }
    return SlowVerdict(**{**defaults, **fields})


def tell(world: World, *slow: SlowVerdict, step: int = 11, **fields: Any) -> None:
    """The leader reports these verdicts, and a step."""
    world.say(**{"newest": summary(step, world.now), "steps": 1000, "slow": slow, **fields})
    world.settle()


def stops(world: World) -> list[Stop]:
    return [message for message in world.sent if isinstance(message, Stop)]


def stopped(world: World) -> None:
    """The leader has brought its last state to the store and ended the workers."""
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(world.status.epoch, "stopped", "Stopped"))
    world.settle()


def condition(world: World) -> Condition | None:
    return next((one for one in world.status.conditions if one.type == constants.CONDITION_SLOW_NODE), None)


def reason(world: World) -> str:
    found = condition(world)
    return found.reason if found else ""


def reasons(world: World) -> list[str]:
    return [event.reason for event in world.events]


def swapped(world: World, slot: int = 1) -> SlowVerdict:
    """A slow node is found and left, and training goes on."""
    found = verdict(world, slot)
    tell(world, found)
    stopped(world)
    tell(world, found, step=12)
    return found


def test_the_operators_list_of_causes_is_the_detectors() -> None:
    assert {cause.value for cause in Cause if cause.blames_node} - {"Network"} == swap.HARDWARE


def test_the_slot_of_a_slow_node_moves_to_the_spare_once_the_leader_has_stopped() -> None:
    world = running()
    tell(world, verdict(world))
    assert world.status.slots["1"] == "run-1-0"  # it trains until the leader has kept a state
    assert reason(world) == "Moving"
    asked = stops(world)[0]
    assert asked.hold, "steps beyond the last state would be done twice"
    assert asked.seconds >= 100, "nothing presses"

    stopped(world)
    assert world.status.slots["1"] == "run-4-0"
    assert "run-1-0" in world.deleted
    (known,) = world.status.faults
    assert (known.cause, known.rung, known.node, known.witness) == ("Straggler", "spare", "node-1", "ownWork")
    assert "rank 3 (node node-1) is slowed down by a slow device" in known.message
    assert [(one.node, one.reason) for one in world.status.excluded_nodes] == [("node-1", "Straggler")]
    assert world.status.budgets_used.pod == 0, "a swap must not bring a job nearer to its end"
    assert {"SlowRank", "Straggler", "NodeExcluded"} <= set(reasons(world))
    assert "a node was slow (run-1-0, node node-1)" in why(world.job, world.now)


def test_one_verdict_moves_one_pod_however_long_the_leader_repeats_it() -> None:
    world = running()
    found = swapped(world)
    asked = len(stops(world))
    for step in range(13, 20):
        world.now += 1
        tell(world, found, step=step)
    assert len(stops(world)) == asked
    assert [fault.cause for fault in world.status.faults] == ["Straggler"]
    last = condition(world)
    assert last is not None
    assert (last.status, last.reason) == ("False", "NoSlowNode")


def test_where_the_next_pod_comes_to_the_same_node_its_old_verdict_does_not_count() -> None:
    """An administrator's word, or a time of exclusion that is over, may bring it back there."""
    world = running()
    found = swapped(world)
    pod = world.pod_of(1)
    world.pods[pod.name] = replace(pod, node="node-1")
    tell(world, found, step=13)
    assert len(world.status.faults) == 1
    assert stops(world)[-1].epoch < world.status.epoch


@pytest.mark.parametrize(
    ("cause", "nodes"),
    [("Data", ()), ("Pauses", ()), ("LengthImbalance", ()), ("PipelineImbalance", ()), ("Data", ("node-1",))],
)
def test_no_node_is_left_for_what_another_one_would_not_help_against(cause: str, nodes: tuple[str, ...]) -> None:
    world = running()
    tell(world, verdict(world, cause=cause, nodes=nodes))
    assert stops(world) == []
    assert condition(world) is None


def test_for_a_host_that_its_containers_limit_holds_up_no_node_is_left_and_the_remedy_is_said() -> None:
    """The leader's verdict on it names no node. One on a host that its node holds up does, and that is left."""
    world = running()
    limit = verdict(world, cause="Host", nodes=(), evidence="Raise resources.limits.cpu.")
    for step in range(11, 14):
        world.now += 1
        tell(world, limit, step=step)
    assert stops(world) == []
    assert condition(world) is None
    assert world.status.excluded_nodes == []
    assert "Raise resources.limits.cpu." in why(world.job, world.now)
    tell(world, limit, verdict(world, slot=2, cause="Host"), step=14)
    assert reason(world) == "Moving"
    assert stops(world) != []
    stopped(world)
    assert [one.node for one in world.status.excluded_nodes] == ["node-2"]


def test_what_comes_and_goes_pushes_no_slow_node_out_of_the_status() -> None:
    """Pauses that are found every half minute, while another pod is made ready."""
    world = running(spares=0)
    world.room = False
    found = verdict(world)
    for number in range(15):
        world.now += 30
        tell(world, found, verdict(world, cause="Pauses", ranks=(), nodes=(), ended=world.now), step=11 + number)
    assert reason(world) == "NoRoom"
    assert [one.ended for one in world.status.verdicts if one.cause == "Compute"] == [None]
    assert len(world.status.verdicts) == 10


def test_report_leaves_no_node() -> None:
    world = running(action="Report")
    tell(world, verdict(world))
    assert stops(world) == []
    assert condition(world) is None


def test_a_verdict_that_is_over_moves_nobody() -> None:
    world = running()
    tell(world, verdict(world, ended=world.now))
    assert stops(world) == []


def test_without_a_spare_the_other_pod_is_made_ready_first_and_not_on_that_node() -> None:
    world = running(spares=0)
    world.auto = False
    tell(world, verdict(world))
    assert world.created[-1] == "run-4-0"
    assert reason(world) == "PodStarting"
    assert stops(world) == []
    world.auto = True
    world.run_pods()
    world.settle()
    assert stops(world) != []
    stopped(world)
    assert world.status.slots["1"] == "run-4-0"
    assert world.status.faults[-1].rung == "spare"


def test_without_room_it_is_said_once_and_training_goes_on() -> None:
    world = running(spares=0)
    world.room = False
    found = verdict(world)
    for step in range(11, 40):
        world.now += 10
        tell(world, found, step=step)
    assert reason(world) == "NoRoom"
    assert reasons(world).count("SlowNodeKept") == 1
    assert stops(world) == []
    assert world.deleted == []
    assert "run-1-0 on node-1 is slow and stays there: there is no room" in why(world.job, world.now)
    tell(world, replace(found, ended=world.now), step=41)
    assert world.deleted == ["run-4-0"]  # nobody needs it any more


def test_where_there_is_no_other_node_no_pod_is_made_for_it() -> None:
    """A machine of its own, under `lockstep run`: the next pod would be as slow."""
    world = running(nodes=1, spares=0)
    world.nodes = {"node-0": Node("node-0")}
    tell(world, verdict(world, slot=0))
    assert reason(world) == "NoRoom"
    assert world.created == ["run-0-0"]


def test_a_spare_on_the_slow_node_takes_no_slot() -> None:
    world = running()
    spare = world.pods["run-4-0"]
    world.pods["run-4-0"] = replace(spare, node="node-1")
    tell(world, verdict(world))
    assert stops(world) == []
    world.now += 60
    tell(world, verdict(world, at=world.now - 60), step=12)
    assert world.status.incarnations["4"] == 1, "it is replaced elsewhere"


def test_steps_that_stand_still_are_no_reason_to_lose_some() -> None:
    world = running()
    tell(world, verdict(world))
    world.now += 30  # an evaluation, say
    world.answers("run-4-0")
    world.settle()
    assert world.status.slots["1"] == "run-1-0"


def test_one_node_at_a_time_the_one_that_was_found_first() -> None:
    world = running(spares=2)
    first, second = verdict(world, slot=2), verdict(world, slot=1, at=world.now + 1)
    tell(world, second, first)
    stopped(world)
    assert world.status.slots["2"] == "run-4-0"
    assert world.status.slots["1"] == "run-1-0"
    tell(world, second, first, step=12)
    stopped(world)
    assert world.status.slots["1"] != "run-1-0"


def test_a_node_that_is_about_to_go_is_left_before_one_that_is_slow() -> None:
    """There is one spare: waiting for two would mean that neither is left in time."""
    world = running()
    world.nodes["node-2"] = Node("node-2", leaving="spot interruption")
    tell(world, verdict(world))
    assert reason(world) == "OthersFirst"
    assert not stops(world)[0].hold
    stopped(world)
    assert world.status.slots["2"] == "run-4-0"
    assert world.status.slots["1"] == "run-1-0"


def test_no_more_nodes_are_left_in_an_hour_than_the_job_allows() -> None:
    world = running(nodes=8, spares=3, stragglers={"swapsPerHour": 2})
    for slot in (1, 2):
        swapped(world, slot)
        world.now += 60
    found = verdict(world, slot=3)
    tell(world, found, step=20)
    assert reason(world) == "SwapLimit"
    assert reasons(world).count("SlowNodeKept") == 1
    assert "swapsPerHour (2)" in why(world.job, world.now)
    world.now += 3600
    tell(world, found, step=21)
    assert reason(world) == "Moving"


def test_a_wrong_rule_that_other_faults_push_out_of_the_status_still_counts() -> None:
    """The status keeps ten faults; what is excluded it keeps as long as it is."""
    world = running(nodes=8, spares=3, stragglers={"swapsPerHour": 1})
    swapped(world)
    world.job = world.job.model_copy(update={"status": world.status.model_copy(update={"faults": []})})
    tell(world, verdict(world, slot=3), step=20)
    assert reason(world) == "SwapLimit"


def test_the_breaker_on_excluded_nodes_holds_for_slow_ones_too() -> None:
    world = running()
    now = rfc3339(world.now)
    excluded = [ExcludedNode(node=f"bad-{n}", since=now, until=rfc3339(world.now + 900)) for n in range(4)]
    world.job = world.job.model_copy(update={"status": world.status.model_copy(update={"excluded_nodes": excluded})})
    tell(world, verdict(world))
    assert reason(world) == "SwapLimit"
    assert stops(world) == []


def test_where_most_nodes_are_called_slow_none_is_left() -> None:
    world = running(spares=3)
    tell(world, *(verdict(world, slot=slot, at=world.now + slot) for slot in (1, 2, 3)))
    assert reason(world) == "ManySlowNodes"
    assert stops(world) == []
    assert reasons(world).count("SlowNodeKept") == 1


def test_a_single_node_that_is_slow_is_not_most_of_them() -> None:
    """The ranks of one node are compared with each other, and it may have the only one."""
    world = running(nodes=1)
    tell(world, verdict(world, slot=0))
    assert reason(world) == "Moving"


def test_no_restart_for_the_last_minutes() -> None:
    world = running()
    tell(world, verdict(world), step=900)  # a fifth of 100 s
    assert reason(world) == "NotWorthIt"
    assert stops(world) == []


def test_nothing_moves_while_states_cannot_be_stored() -> None:
    world = running()
    found = verdict(world)
    tell(world, found, checkpoint_problem="the store does not answer")
    assert reason(world) == "StoreUnavailable"
    tell(world, found, step=12)
    assert reason(world) == "Moving"


def test_a_leader_that_has_stopped_is_not_left_standing_by_a_limit() -> None:
    """It has ended its workers for the swap: going on as before would cost the same restart for nothing."""
    world = running()
    tell(world, verdict(world), step=690)
    assert stops(world)
    assert world.leader is not None
    assert world.leader.progress is not None
    world.leader = replace(
        world.leader,
        progress=replace(world.leader.progress, newest=summary(701, world.now)),
        finished=finished(world.status.epoch, "stopped", "Stopped"),
    )
    world.settle()
    assert world.status.slots["1"] == "run-4-0"


def test_another_operator_comes_to_the_same_move() -> None:
    world = running()
    found = verdict(world)
    tell(world, found)
    world.new_operator()
    world.settle()
    stopped(world)
    assert world.status.slots["1"] == "run-4-0"
    assert len(world.status.faults) == 1


def test_verdicts_of_three_jobs_exclude_the_node_for_all_jobs_until_they_are_old() -> None:
    jobs = []
    for uid in ("first", "second", "third"):
        world = running()
        world.job = world.job.model_copy(update={"metadata": {**world.job.metadata, "uid": uid}})
        swapped(world)
        jobs.append(world.job)
    two = decide(remember({}, jobs[:2], START), nodes=100, now=START + 60, limits=Limits())
    assert two.changes == ()
    three = decide(remember(two.records, jobs, START), nodes=100, now=START + 60, limits=Limits())
    assert [(change.node, change.kind) for change in three.changes] == [("node-1", "NodeExcluded")]
    later = decide(three.records, nodes=100, now=START + 12 * 86_400, limits=Limits())
    assert [(change.node, change.kind) for change in later.changes] == [("node-1", "NodeReleased")]
