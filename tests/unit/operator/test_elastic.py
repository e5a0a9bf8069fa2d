"""Rung 5: a job goes on with fewer nodes while there is no room, grows when there is, and lets its pods go where even
the fewest do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lockstep_api import constants
from lockstep_api.messages import Membership, Stop
from lockstep_api.v1alpha1 import Condition, Phase, TrainingJob
from lockstep_operator.plan.requeue import PAUSE_SECONDS
from lockstep_operator.plan.times import rfc3339
from manifests import trainer_job
from unit.operator.builders import UID, World, durable, finished, make_job, summary

ELASTIC = {"elastic": {"minNodes": 2, "shrinkAfterSeconds": 60}, "requeueAfterSeconds": 600}


def elastic_job(nodes: int = 4, **resilience: Any) -> TrainingJob:
    """A trainer's job of nodes with one GPU, and 12 samples a step: it can train on 4, 3 and 2 nodes."""
    manifest = trainer_job(name="run")
    manifest["metadata"] |= {"namespace": "team", "uid": UID, "generation": 1}
    manifest["spec"] |= {"nodes": nodes, "gpusPerNode": 1, "resilience": {**ELASTIC, **resilience}}
    manifest["spec"]["trainer"]["recipe"]["globalBatchTokens"] = 12 * 128
    return TrainingJob.model_validate(manifest)


def condition(world: World, kind: str) -> Condition:
    (found,) = [each for each in world.status.conditions if each.type == kind]
    return found


def lose(world: World, *slots: int) -> None:
    """Nodes are gone, and there is no room for other pods."""
    world.room = False
    for slot in slots:
        world.take_down(world.pod_of(slot).node)
        del world.pods[world.status.slots[str(slot)]]
    world.settle()


def pass_time(world: World, seconds: float) -> None:
    """The leader goes on talking; its steps go on only where it makes some."""
    world.now += seconds
    world.agents = {uid: replace(agent, answered=world.now) for uid, agent in world.agents.items()}
    world.settle()


def shrunk(job: TrainingJob, *lost: int) -> World:
    """A job that has lost these slots and trains on what is left."""
    world = World(job)
    world.train()
    lose(world, *lost)
    pass_time(world, 60)
    world.train(5)
    return world


def memberships(world: World) -> list[Membership]:
    return [message for message in world.sent if isinstance(message, Membership)]


def test_a_vacant_slot_waits_for_a_pod_before_the_job_goes_on_without_it() -> None:
    world = World(elastic_job())
    world.train()
    lose(world, 3)
    pass_time(world, 59)

    assert world.status.epoch == 1
    assert world.status.phase == Phase.RECOVERING
    ready = condition(world, constants.CONDITION_READY)
    assert f"training goes on with 3 of 4 nodes from {rfc3339(world.now + 1)} on" in ready.message

    pass_time(world, 1)
    assert world.status.epoch == 2
    assert world.status.elastic.nodes == 3
    assert list(world.status.slots) == ["0", "1", "2"]
    assert [info.slot for info in memberships(world)[-1].slots] == [0, 1, 2]


def test_a_job_that_trains_on_fewer_nodes_says_so_everywhere() -> None:
    world = shrunk(elastic_job(), 3)

    assert world.status.phase == Phase.RUNNING
    assert condition(world, constants.CONDITION_READY).status == "True"
    told = condition(world, constants.CONDITION_SHRUNK)
    assert (told.status, told.reason) == ("True", "NoRoom")
    assert "Training on 3 of 4 nodes. run-3-1: waits for the scheduler." in told.message
    assert world.status.restarts.shrink == 1
    assert [fault.rung for fault in world.status.faults] == ["shrink"]
    assert any("3 of 4 nodes go on" in event.message for event in world.events)


def test_survivors_beyond_the_last_slot_move_to_the_vacant_ones() -> None:
    """Slots are numbers without holes: the leader's is taken by a survivor."""
    world = World(elastic_job())
    world.train()
    names = dict(world.status.slots)
    lose(world, 0)
    pass_time(world, 60)
    assert world.status.slots == {"0": names["3"], "1": names["1"], "2": names["2"]}


def test_members_that_make_no_whole_replica_become_spares() -> None:
    manifest = elastic_job().to_wire()
    manifest["spec"]["parallelism"] = {"pipeline": 2}
    world = World(TrainingJob.model_validate(manifest))
    world.train()
    lose(world, 1)
    pass_time(world, 60)

    assert world.status.elastic.nodes == 2
    membership = memberships(world)[-1]
    assert len(membership.slots) == 2
    assert [info.pod for info in membership.spares] == ["run-3-0"]
    assert "run-3-0" not in world.deleted


def test_a_job_grows_behind_a_last_checkpoint_once_all_pods_are_back() -> None:
    world = shrunk(elastic_job(), 3)
    world.sent.clear()
    world.make_room()
    world.settle()
    stops = [message for message in world.sent if isinstance(message, Stop)]
    assert stops
    assert stops[0].epoch == 2
    assert not memberships(world)  # nothing changes before the checkpoint is durable

    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(2, "stopped", "Stopped"))
    world.settle()
    assert world.status.epoch == 3
    assert world.status.elastic.nodes == 4
    assert len(world.status.slots) == 4
    world.train(6)
    told = condition(world, constants.CONDITION_SHRUNK)
    assert (told.status, told.message) == ("False", "Training on all 4 nodes.")


def test_no_job_is_interrupted_to_grow_before_the_newcomers_imports_are_loaded() -> None:
    world = shrunk(elastic_job(), 3)
    world.sent.clear()
    (newcomer,) = [name for name, pod in world.pods.items() if pod.phase == "Pending"]
    world.make_room()
    for warm in (False, True):
        world.answers(newcomer, warm=warm)
        world.settle()
        assert bool([message for message in world.sent if isinstance(message, Stop)]) == warm


def test_no_job_is_interrupted_to_grow_while_checkpoints_can_t_be_made_durable() -> None:
    world = shrunk(elastic_job(), 3)
    world.say(newest=summary(6, world.now), checkpoint_problem="the store is away")
    world.settle()
    world.sent.clear()
    world.make_room()
    world.settle()
    assert not [message for message in world.sent if isinstance(message, Stop)]


def test_a_stopped_job_whose_pod_is_lost_again_goes_on_as_it_was() -> None:
    world = shrunk(elastic_job(), 3)
    world.make_room()
    world.settle()
    newcomer = next(pod for pod in world.pods.values() if pod.name not in world.status.slots.values())
    world.room = False
    del world.pods[newcomer.name]
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(2, "stopped", "Stopped"))
    world.settle()
    assert world.status.epoch == 3
    assert world.status.elastic.nodes == 3


def test_a_script_shrinks_and_grows_without_a_checkpoint() -> None:
    world = shrunk(make_job(nodes=3, resilience=ELASTIC), 2)
    assert world.status.elastic.nodes == 2
    world.make_room()
    world.settle()
    assert world.status.elastic.nodes == 3
    assert not [message for message in world.sent if isinstance(message, Stop)]


def test_the_wanted_pods_are_still_all_of_them() -> None:
    """A pending pod is how the return of room is noticed."""
    world = shrunk(elastic_job(), 3)
    assert [pod.name for pod in world.pods.values() if not pod.node] == ["run-3-1"]


def requeued(world: World) -> World:
    world.train()
    lose(world, 1, 2, 3)
    pass_time(world, 600)
    return world


def test_where_even_the_fewest_do_not_fit_all_pods_are_let_go_behind_a_checkpoint() -> None:
    world = requeued(World(elastic_job()))
    ready = condition(world, constants.CONDITION_READY)
    assert "1 nodes are there, and resilience.elastic.minNodes is 2" in ready.message
    assert [message for message in world.sent if isinstance(message, Stop)]
    assert world.pods

    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(1, "stopped", "Stopped"))
    world.settle()
    assert not world.pods
    assert world.status.slots == {}
    assert world.status.phase == Phase.PENDING
    assert condition(world, constants.CONDITION_READY).reason == "Requeued"
    assert world.status.restarts.requeue == 1
    assert {fault.rung for fault in world.status.faults} == {"requeue"}
    assert [event.reason for event in world.events].count("Requeued") == 1


def test_a_requeued_job_begins_again_later_and_never_quickly() -> None:
    world = World(make_job(nodes=3, resilience={"requeueAfterSeconds": 600}))
    requeued_at: list[float] = []
    world.train()
    lose(world, 1, 2)
    for first, pause in zip((PAUSE_SECONDS[0] * 2**n for n in range(3)), range(3), strict=True):
        pass_time(world, 600)
        assert not world.pods
        assert world.status.restarts.requeue == pause + 1
        requeued_at.append(world.now)
        pass_time(world, first - 1)
        assert not world.pods
        pass_time(world, 1)
        assert len(world.pods) == 3
    pass_time(world, 600)
    assert world.status.phase == Phase.FAILED
    assert condition(world, constants.CONDITION_FAILED).reason == "RequeueBudgetExceeded"


def test_a_requeued_job_that_finds_room_starts_on_all_nodes_and_its_budget_refills() -> None:
    world = requeued(World(elastic_job()))
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(1, "stopped", "Stopped"))
    world.settle()
    world.nodes.clear()
    world.room = True
    pass_time(world, PAUSE_SECONDS[0])
    world.train(7)
    assert (world.status.elastic.nodes, world.status.budgets_used.requeue) == (4, 1)
    world.say(newest=summary(9, world.now), **durable(8, world.now + 1, epoch=world.status.epoch))
    world.settle()
    assert world.status.budgets_used.requeue == 0


def test_a_job_that_has_never_begun_is_not_requeued() -> None:
    world = World(make_job(nodes=2, resilience={"requeueAfterSeconds": 60}))
    world.room = False
    world.settle()
    pass_time(world, 3600)
    assert len(world.pods) == 2
    assert world.status.restarts.requeue == 0


def test_suspension_forgets_that_a_job_was_shrunk() -> None:
    world = shrunk(make_job(nodes=3, resilience=ELASTIC), 2)
    world.job = world.job.model_copy(update={"spec": world.job.spec.model_copy(update={"suspend": True})})
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(world.status.epoch, "stopped", "Stopped"))
    world.settle()
    assert world.status.phase == Phase.SUSPENDED
    assert world.status.elastic.nodes == 0
