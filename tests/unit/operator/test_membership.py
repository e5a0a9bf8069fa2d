"""Who holds which slot, when a new epoch is raised, and what is told to whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep_api import constants
from lockstep_api.messages import EpochRequest, Membership, Term
from lockstep_operator.plan import slots
from lockstep_operator.plan.observed import Agent, Leader
from unit.operator.builders import UID, World, finished, inventory, make_job, replace_request, summary


def test_a_job_starts_with_as_many_pods_as_nodes_and_spares_and_one_epoch() -> None:
    world = World(make_job(nodes=2, spares=1))
    world.settle()

    assert world.created == ["run-0-0", "run-1-0", "run-2-0"]
    assert world.children == {"Service", "Secret", "ConfigMap"}
    assert world.status.epoch == 1
    assert world.status.slots == {"0": "run-0-0", "1": "run-1-0"}
    (membership,) = [message for message in world.sent if isinstance(message, Membership)]
    assert [info.pod for info in membership.slots] == ["run-0-0", "run-1-0"]
    assert [info.pod for info in membership.spares] == ["run-2-0"]


def test_no_epoch_is_raised_before_every_slot_has_an_agent_that_answers() -> None:
    world = World(make_job(nodes=2), auto=False)
    world.step()
    world.run_pods()
    first = world.pods["run-0-0"]
    world.agents[first.uid] = Agent(inventory(first), world.now)
    decided = world.step()

    assert world.status.epoch == 0
    assert [target.pod for target in decided.probe] == ["run-1-0"]


def test_membership_is_sent_only_by_the_process_that_wrote_the_epoch() -> None:
    """Protects against two operators sending different members under one epoch."""
    world = World(make_job(nodes=2))
    world.step()
    world.settle()
    assert world.fenced is not None
    world.leader = replace(world.leader, inventory=replace(world.leader.inventory, leading=None))  # type: ignore
    world.fenced = None
    world.agents = {pod.uid: Agent(inventory(pod, 1), world.now) for pod in world.pods.values()}
    world.sent.clear()
    world.settle()

    assert world.status.epoch == 2
    assert {message.epoch for message in world.sent if isinstance(message, Membership)} == {2}
    assert any("another operator" in event.message for event in world.events)


def test_a_new_operator_leaves_a_healthy_run_alone() -> None:
    """Protects running jobs from operator restarts and upgrades: no new epoch, no probe of every pod."""
    world = World(make_job(nodes=3))
    world.train()
    world.new_operator()
    before = world.status
    world.say(newest=summary(2, world.now), connected=3)
    decided = world.settle()

    assert world.status.epoch == before.epoch
    assert world.status.slots == before.slots
    assert decided.probe == ()
    assert len(world.created) == 3


def test_a_new_epoch_is_above_every_epoch_that_an_agent_has_seen() -> None:
    world = World(make_job(nodes=1), auto=False)
    world.step()
    world.run_pods()
    (pod,) = world.pods.values()
    world.agents[pod.uid] = Agent(inventory(pod, epoch=7), world.now)
    world.step()
    assert world.status.epoch == 8


def test_survivors_keep_their_slots_when_the_leader_is_replaced() -> None:
    world = World(make_job(nodes=3))
    world.train()
    survivors = {slot: name for slot, name in world.status.slots.items() if slot != "0"}
    del world.pods["run-0-0"]
    world.settle()

    assert world.status.slots == {"0": "run-0-1", **survivors}
    assert world.status.epoch == 2


def test_a_spare_takes_the_slot_at_once_and_is_itself_replaced() -> None:
    world = World(make_job(nodes=2, spares=1))
    world.train()
    del world.pods["run-1-0"]
    world.settle()

    assert world.status.slots == {"0": "run-0-0", "1": "run-2-0"}
    assert (world.status.restarts.spare, world.status.restarts.pod) == (1, 0)
    assert "run-1-1" in world.created


def test_a_spare_that_does_not_answer_gets_no_slot() -> None:
    """Its node may have died with the member's: the rack's power, say. A living one is taken first."""
    world = World(make_job(nodes=2, spares=2))
    world.train()
    world.now += 3600
    world.say(newest=summary(2, world.now))
    dead, alive = "run-2-0", "run-3-0"
    world.auto = False
    del world.pods["run-1-0"]
    decided = world.step()
    assert {target.pod for target in decided.probe} == {dead, alive}
    world.agents[world.pods[alive].uid] = Agent(inventory(world.pods[alive]), world.now)
    world.step()
    assert world.status.slots == {"0": "run-0-0", "1": alive}


def test_a_leader_that_lost_its_generation_numbers_gets_a_new_epoch_with_the_same_members() -> None:
    world = World(make_job(nodes=2))
    world.train()
    before = world.status.slots
    assert world.leader is not None
    world.leader = replace(world.leader, epoch_request=EpochRequest(UID, 1, "its volume was empty"))
    world.settle()
    assert (world.status.epoch, world.status.slots) == (2, before)


def test_an_old_epoch_request_is_dropped() -> None:
    world = World(make_job(nodes=2))
    world.train()
    assert world.leader is not None
    world.leader = replace(world.leader, epoch_request=EpochRequest(UID, 0, "its volume was empty"))
    world.settle()
    assert world.status.epoch == 1


def test_a_pod_that_comes_back_with_another_boot_is_another_member() -> None:
    """A node reboot keeps the pod's uid and loses its memory."""
    world = World(make_job(nodes=2))
    world.train()
    pod = world.pod_of(1)
    world.agents[pod.uid] = Agent(inventory(pod, 1, boot_id="after the reboot"), world.now)
    world.settle()
    assert world.status.epoch == 2
    assert world.status.slots["1"] == pod.name


def test_fewer_spares_take_the_highest_spare_away_and_never_a_member() -> None:
    world = World(make_job(nodes=2, spares=2))
    world.train()
    del world.pods["run-0-0"]
    world.settle()  # run-2-0 is a member now
    world.job = world.job.model_copy(update={"spec": world.job.spec.model_copy(update={"spares": 0})})
    world.settle()
    assert set(world.pods) == {"run-1-0", "run-2-0"}
    assert world.status.epoch == 2


def test_resuming_after_a_stop_starts_a_new_epoch() -> None:
    world = World(make_job(nodes=1))
    world.train()
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(1, "stopped"))
    world.settle()
    assert world.status.epoch == 2
    assert world.status.phase == "Recovering"


@pytest.mark.parametrize(
    ("nodes", "holders", "candidates", "expected"),
    [
        (2, {}, [0, 1], {0: "run-0-0", 1: "run-1-0"}),
        (2, {}, [3, 1, 2], {0: "run-1-0", 1: "run-2-0"}),
        (2, {1: "run-0-0"}, [0, 5], {1: "run-0-0", 0: "run-5-0"}),
        (2, {1: "run-0-0"}, [0], None),
        (1, {0: "run-9-0"}, [0], {0: "run-9-0"}),
    ],
)
def test_assignment(
    nodes: int, holders: dict[int, str], candidates: list[int], expected: dict[int, str] | None
) -> None:
    world = World(make_job())
    pods = [world.add_pod(f"run-{ordinal}-0", ordinal, 0) for ordinal in candidates]
    assert slots.assign(nodes, holders, slots.preferred(pods, world.agents)) == expected


def test_a_request_to_replace_everybody_of_an_older_epoch_changes_nothing() -> None:
    world = World(make_job(nodes=3))
    world.train()
    assert world.leader is not None
    world.leader = replace(world.leader, replace=replace_request(0, 1, 2))
    world.settle()
    assert world.status.epoch == 1


def test_a_leader_of_another_pod_is_not_listened_to() -> None:
    world = World(make_job(nodes=2))
    world.train(step=5)
    stranger = world.pods["run-1-0"]
    world.leader = Leader(stranger.uid, True, world.now, inventory=inventory(stranger, leading=1, term=Term(1, 0)))
    decided = world.plan()
    assert decided.leader is not None
    assert decided.leader.pod == "run-0-0"
    assert not decided.send


# ----------------------------------------------------------------------------------------------------- TLS


def speaks(world: World) -> list[bool]:
    return [pod.tls for pod in world.pods.values()]


def test_a_job_of_before_an_upgrade_keeps_its_language_until_none_of_its_pods_is_left() -> None:
    """Members call each other: one that speaks otherwise would reach nobody."""
    world = World(make_job(nodes=2), tls=False)
    world.settle()
    world.tls = True  # the operator that comes next
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], phase="Failed", running=False)
    world.settle()
    assert "run-1-1" in world.pods
    assert speaks(world) == [False, False]
    assert world.plan().leader is not None
    assert world.plan().leader.tls is False  # type: ignore[union-attr]
    world.pods.clear()
    world.settle()
    assert speaks(world) == [True, True]


def test_turning_tls_off_leaves_running_jobs_alone() -> None:
    world = World(make_job(nodes=2))
    world.settle()
    world.tls = False
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], phase="Failed", running=False)
    world.settle()
    assert "run-1-1" in world.pods
    assert speaks(world) == [True, True]


def test_a_template_may_do_without_tls() -> None:
    """For a trainer image of the version before."""
    world = World(make_job(template={"metadata": {"annotations": {constants.ANNOTATION_TLS: "off"}}}))
    world.settle()
    assert speaks(world) == [False, False]
