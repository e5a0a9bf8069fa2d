"""Beginning, suspension and end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep_api.messages import Membership, StateId, Stop
from lockstep_api.v1alpha1 import Phase, TrainingJobStatus
from lockstep_operator.plan import lifecycle
from lockstep_operator.plan.observed import Refusal
from lockstep_operator.plan.times import rfc3339
from unit.operator.builders import START, World, durable, finished, make_job, summary


def condition(world: World, kind: str) -> str | None:
    return next((one.status for one in world.status.conditions if one.type == kind), None)


def test_phases_of_a_job_that_goes_well() -> None:
    world = World(make_job(nodes=1), auto=False)
    seen = []
    world.step()
    seen.append(world.status.phase)
    world.run_pods()
    world.step()
    seen.append(world.status.phase)
    world.auto = True
    world.train()
    seen.append(world.status.phase)
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(1))
    world.settle()
    seen.append(world.status.phase)
    assert seen == [Phase.PENDING, Phase.STARTING, Phase.RUNNING, Phase.SUCCEEDED]
    assert world.pods == {}
    assert condition(world, "Succeeded") == "True"
    assert condition(world, "Ready") == "False"
    assert world.status.completion_time == rfc3339(START)


@pytest.mark.parametrize("phase", [Phase.SUCCEEDED, Phase.FAILED])
def test_a_job_that_has_ended_never_runs_again(phase: Phase) -> None:
    """Also when its pods are gone, its spec is touched or the operator is new."""
    world = World(make_job(nodes=2, status=TrainingJobStatus(phase=phase, completion_time=rfc3339(START))))
    world.now += 10_000
    decided = world.settle()
    assert world.created == []
    assert decided.leader is None
    assert world.status.phase == phase


def test_a_finish_of_an_older_epoch_does_not_end_the_job() -> None:
    world = World(make_job(nodes=1))
    world.train()
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(0))
    world.settle()
    assert world.status.phase == Phase.RUNNING


def test_a_failure_carries_the_leaders_reason() -> None:
    world = World(make_job(nodes=1))
    world.train()
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(1, "failed", "UserError"))
    world.settle()
    assert world.status.phase == Phase.FAILED
    assert any(event.type == "Warning" and event.reason == "UserError" for event in world.events)


def test_suspending_asks_first_and_deletes_then() -> None:
    world = World(make_job(nodes=2))
    world.train(step=7)
    world.job = world.job.model_copy(update={"spec": world.job.spec.model_copy(update={"suspend": True})})
    decided = world.step()
    stop = Stop("6f0c-uid", 1, "spec.suspend is true", seconds=lifecycle.FINAL_CHECKPOINT_SECONDS)
    assert stop in decided.send
    assert world.status.phase == Phase.SUSPENDING
    assert len(world.pods) == 2

    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(1, "stopped"))
    world.settle()
    assert world.pods == {}
    assert world.status.phase == Phase.SUSPENDED
    assert condition(world, "Suspended") == "True"
    assert world.status.slots == {}
    assert world.status.restarts.total == 0
    assert world.status.faults == []


def test_a_leader_that_does_not_stop_is_not_waited_for_forever() -> None:
    world = World(make_job(nodes=1))
    world.train()
    world.job = world.job.model_copy(update={"spec": world.job.spec.model_copy(update={"suspend": True})})
    world.step()
    world.now += lifecycle.STOP_SECONDS + 1
    world.settle()
    assert world.status.phase == Phase.SUSPENDED


def test_resuming_goes_on_with_new_pods_in_a_new_epoch() -> None:
    world = World(make_job(nodes=1))
    world.train()
    suspended = world.job.spec.model_copy(update={"suspend": True})
    running = world.job.spec
    world.job = world.job.model_copy(update={"spec": suspended})
    world.now += 100
    world.step()
    world.now += lifecycle.STOP_SECONDS + 1
    world.settle()
    world.now += 1000
    world.job = world.job.model_copy(update={"spec": running})
    world.settle()
    assert list(world.pods) == ["run-0-1"]
    assert world.status.epoch == 2
    assert [message.epoch for message in world.sent if isinstance(message, Membership)] == [1, 2]
    assert condition(world, "Suspended") == "False"
    assert world.status.active_seconds == pytest.approx(101 + lifecycle.STOP_SECONDS, abs=1)


def test_a_job_that_is_created_suspended_makes_no_pod() -> None:
    world = World(make_job(nodes=2, suspend=True))
    world.settle()
    assert world.created == []
    assert world.status.phase == Phase.SUSPENDED
    world.now += 10
    assert world.plan().events == ()


def test_the_deadline_counts_active_time_only() -> None:
    world = World(make_job(nodes=1, activeDeadlineSeconds=100))
    world.train()
    decided = world.plan()
    assert decided.again_at == pytest.approx(START + 100, abs=1)
    world.job = world.job.model_copy(
        update={"status": world.status.model_copy(update={"active_seconds": 60.0, "active_since": rfc3339(world.now)})}
    )
    world.now += 39
    world.settle()
    assert world.status.phase == Phase.RUNNING
    world.now += 2
    world.settle()
    assert world.status.phase == Phase.FAILED
    assert any(event.reason == "DeadlineExceeded" for event in world.events)


def test_behind_the_deadline_there_is_time_for_a_last_checkpoint() -> None:
    def world() -> World:
        made = World(make_job(nodes=1, activeDeadlineSeconds=100, checkpoint={"uri": "s3://bucket"}))
        made.train(step=7)
        made.now += 101
        made.settle()
        assert any(isinstance(message, Stop) and message.seconds > 0 for message in made.sent)
        assert made.status.phase == Phase.RUNNING
        return made

    stopped, silent = world(), world()
    assert stopped.leader is not None
    stopped.leader = replace(stopped.leader, finished=finished(1, "stopped"))
    stopped.settle()
    assert stopped.status.phase == Phase.FAILED
    silent.now += lifecycle.FINAL_CHECKPOINT_SECONDS
    silent.settle()
    assert silent.status.phase == Phase.FAILED
    assert any(event.reason == "DeadlineExceeded" for event in silent.events)


def test_the_status_says_what_is_kept_in_memory_and_how_often_checkpoints_are_made() -> None:
    world = World(make_job(nodes=1, checkpoint={"uri": "s3://bucket", "every": "auto"}))
    world.train(step=7)
    figures = {"interval": 30.0, "cost": 0.5, "mtbf": 900.0}
    world.say(newest=summary(7, world.now), kept=StateId(6, 1, 1), cadence=figures)
    world.settle()
    memory, interval = world.status.checkpoint.memory, world.status.checkpoint.interval
    assert memory is not None
    assert interval is not None
    assert (memory.step, memory.at) == (6, rfc3339(world.now))
    pace = summary(7, world.now).seconds
    assert (interval.steps, interval.seconds, interval.formula) == (round(30 / pace), 30.0, "Young/Daly")
    world.say(newest=summary(8, world.now))
    world.settle()
    assert world.status.checkpoint.memory is None
    assert world.status.checkpoint.interval == interval


def test_the_status_says_what_other_data_training_began_on() -> None:
    """A later leader may not know it any more."""
    world = World(make_job(nodes=1, checkpoint={"uri": "s3://bucket"}))
    world.train(step=7)
    for told in ("up to step 4: the seed was 0, and is 1 now", ""):
        world.say(newest=summary(7, world.now), other_data=told)
        world.settle()
        assert world.status.progress.other_data == "up to step 4: the seed was 0, and is 1 now"


def test_the_status_says_what_checks_the_durable_checkpoint_passed() -> None:
    world = World(make_job(nodes=1, checkpoint={"uri": "s3://bucket"}))
    world.train(step=7)
    checks = ("loss and gradient norm are finite",)
    world.say(newest=summary(7, world.now), **durable(6, world.now), durable_verified=checks)
    world.settle()
    found = world.status.checkpoint.durable
    assert found is not None
    assert (found.step, found.verified) == (6, list(checks))
    world.say(newest=summary(8, world.now), durable=durable(6, world.now)["durable"])  # a new leader: it made no commit
    world.settle()
    assert world.status.checkpoint.durable == found
    world.say(newest=summary(9, world.now), **durable(9, world.now))  # an agent of an older release
    world.settle()
    assert world.status.checkpoint.durable is not None
    assert world.status.checkpoint.durable.verified is None


@pytest.mark.parametrize(
    ("ttl", "waited", "gone"), [(60, 59, False), (60, 61, True), (0, 1, True), (None, 10**6, False)]
)
def test_ttl_deletes_the_job_itself(ttl: int | None, waited: int, gone: bool) -> None:
    spec = {} if ttl is None else {"ttlSecondsAfterFinished": ttl}
    ended = TrainingJobStatus(phase=Phase.SUCCEEDED, completion_time=rfc3339(START))
    world = World(make_job(nodes=1, status=ended, **spec))
    world.now += waited
    world.step()
    assert world.job_deleted is gone


def test_a_job_of_another_controller_is_left_alone() -> None:
    world = World(make_job(nodes=1, managedBy="example.com/other"))
    decided = world.settle()
    assert (world.created, world.status, decided.children) == ([], TrainingJobStatus(), ())


@pytest.mark.parametrize(
    ("code", "phase", "reason"),
    [
        (422, Phase.FAILED, "InvalidTemplate"),
        (400, Phase.FAILED, "InvalidTemplate"),
        (403, Phase.PENDING, "CreationRefused"),
    ],
)
def test_what_the_server_refuses_is_told(code: int, phase: Phase, reason: str) -> None:
    world = World(make_job(nodes=2), auto=False)
    world.step()
    world.refusal = Refusal("A pod", code, "exceeded quota: small", world.now + 30)
    world.settle()
    assert world.status.phase == phase
    assert any(one.reason == reason and "exceeded quota" in one.message for one in world.status.conditions)
    assert world.pods == {}  # nothing half-made is left


@pytest.mark.parametrize(
    ("code", "message", "kept"),
    [
        (400, 'admission webhook "a.b.c" denied the request: images must come from here', 0),
        (422, "ValidatingAdmissionPolicy 'a' with binding 'b' denied request: no", 0),
        (500, 'Internal error occurred: failed calling webhook "x": context deadline exceeded', 2),
    ],
)
def test_what_may_be_allowed_later_ends_no_job(code: int, message: str, kept: int) -> None:
    world = World(make_job(nodes=2), auto=False)
    world.step()
    world.refusal = Refusal("A pod", code, message, world.now + 30)
    world.settle()
    assert world.status.phase == Phase.PENDING
    assert any(one.reason == "CreationRefused" and message in one.message for one in world.status.conditions)
    assert len(world.pods) == kept  # a server that can't answer has refused nothing


def test_a_refusal_during_training_takes_no_pod_away() -> None:
    world = World(make_job(nodes=2))
    world.train()
    world.refusal = Refusal("A pod", 403, "exceeded quota", world.now + 30)
    del world.pods["run-1-0"]
    world.auto = False
    decided = world.step()
    assert decided.create == ()
    assert "run-0-0" in world.pods
    world.now += 31
    assert [new.name for new in world.plan().create] == ["run-1-1"]


def test_loss_and_step_are_shown_as_people_write_them() -> None:
    world = World(make_job(nodes=1))
    world.settle()
    world.say(newest=summary(41230, world.now), steps=100000, tokens=5, connected=1)
    world.settle()
    assert (world.status.step, world.status.loss, world.status.ready) == ("41230/100000", "2.000", "1/1")


def test_trouble_with_checkpoints_is_an_event_when_it_begins_and_when_it_ends() -> None:
    world = World(make_job(nodes=2, checkpoint={"uri": "s3://bucket"}))
    world.train(step=7)
    for _ in range(2):
        world.say(newest=summary(8, world.now), checkpoint_problem="slot 1: the store does not answer")
        world.settle()
    assert condition(world, "CheckpointDegraded") == "True"
    world.say(newest=summary(9, world.now))
    world.settle()
    assert condition(world, "CheckpointDegraded") == "False"
    said = [(event.type, event.reason) for event in world.events if event.reason.startswith("Store")]
    assert said == [("Warning", "StoreUnavailable"), ("Normal", "StoreAnswers")]


def test_a_job_that_waited_for_the_store_with_its_last_step_ends_without_trouble() -> None:
    """The leader's last word comes together with the news that the store is back, or before it."""
    world = World(make_job(nodes=2, checkpoint={"uri": "s3://bucket"}))
    world.train(step=99)
    world.say(state="finishing", newest=summary(100, world.now), checkpoint_problem="the store does not answer")
    world.settle()
    assert (world.status.phase, condition(world, "CheckpointDegraded")) == (Phase.RUNNING, "True")
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(1))
    world.settle()
    assert (world.status.phase, condition(world, "CheckpointDegraded")) == (Phase.SUCCEEDED, "False")


# --------------------------------------------------------------------------------------- start-up deadline


def test_a_job_that_does_not_start_in_time_fails_with_what_it_waited_for() -> None:
    world = World(make_job(nodes=2, startupDeadlineSeconds=600), auto=False)
    world.step()
    name = "run-1-0"
    world.pods[name] = replace(world.pods[name], message="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    world.pods["run-0-0"] = replace(world.pods["run-0-0"], node="node-0")
    world.now += 599
    world.settle()
    assert world.status.phase == "Pending"
    assert world.plan().again_at == world.now + 1
    world.now += 1
    world.step()
    assert world.status.phase == "Failed"
    failed = next(one for one in world.status.conditions if one.type == "Failed")
    assert failed.reason == "StartupDeadlineExceeded"
    assert "startupDeadlineSeconds" in failed.message
    assert "run-1-0: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu" in failed.message


def test_members_that_are_up_but_make_no_step_miss_the_deadline_too() -> None:
    world = World(make_job(nodes=2, startupDeadlineSeconds=600))
    world.settle()
    world.say(state="starting")
    world.settle()
    assert world.status.phase == "Starting"
    world.now += 600
    world.step()
    assert world.status.phase == "Failed"


def test_a_first_step_at_the_last_moment_counts() -> None:
    world = World(make_job(nodes=2, startupDeadlineSeconds=600))
    world.settle()
    world.now += 600
    world.say(newest=summary(1, world.now))
    world.settle()
    assert world.status.phase == "Running"


def test_a_job_that_has_run_may_take_longer_to_recover_than_to_start() -> None:
    world = World(make_job(nodes=2, startupDeadlineSeconds=600))
    world.train(step=5)
    world.auto = False
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], phase="Failed")
    world.settle()
    world.now += 1_200
    world.settle()
    assert world.status.phase == "Recovering"


def test_time_in_suspension_is_no_start() -> None:
    world = World(make_job(nodes=1, startupDeadlineSeconds=600, suspend=True))
    world.now += 10_000
    world.settle()
    assert world.status.phase == "Suspended"
    world.job = world.job.model_copy(update={"spec": world.job.spec.model_copy(update={"suspend": False})})
    world.auto = False
    world.settle()
    world.now += 599
    world.settle()
    assert world.status.phase == "Pending"
    world.now += 1
    world.step()
    assert world.status.phase == "Failed"
