"""What of a fault is kept and counted, once, and what it costs of the budgets."""

from __future__ import annotations

from dataclasses import replace

from lockstep_api.messages import FaultAck, Recovered, Term
from unit.operator.builders import START, World, durable, fault, replace_request, running, summary


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


def test_a_loss_names_the_generation_that_it_ended() -> None:
    """Also the leader's own: a recovery is matched to the newest fault before its term."""
    world = running(nodes=2)
    world.say(newest=summary(12, world.now), term=Term(1, 4))
    world.now += 2
    del world.pods["run-0-0"]
    world.step()
    (kept,) = world.status.faults
    assert (kept.epoch, kept.generation, kept.seconds) == (1, 4, {"detect": 2.0})


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
