"""What of a fault is kept and counted, once, and what it costs of the budgets."""

from __future__ import annotations

import json
from dataclasses import replace

from lockstep_api.messages import CorruptVerdict, FaultAck, Recovered, Term
from lockstep_operator.plan.nodes.blame import told_by
from lockstep_operator.plan.nodes.score import THRESHOLD
from lockstep_operator.plan.story import describe
from unit.operator.builders import START, World, durable, fault, replace_request, running, summary


def stored(world: World) -> int:
    """Bytes of the status as etcd stores it, which takes 1.5 MiB."""
    return len(json.dumps(world.status.to_wire(), ensure_ascii=False, separators=(",", ":")).encode())


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
    assert FaultAck("6f0c-uid", Term(1, 1), spares=0) in world.plan().send


def test_the_acknowledgement_says_how_many_spares_there_are() -> None:
    """Who is only suspected is put aside where there is one. A pod that finds no node is none."""
    world = running(nodes=2, spares=2)
    assert world.leader is not None
    spare = next(pod for pod in world.pods.values() if pod.name not in world.status.slots.values())
    world.pods[spare.name] = replace(spare, phase="Pending", running=False, node="", address="")
    world.leader = replace(world.leader, faults=(fault(1, 1),))
    world.step()
    assert FaultAck("6f0c-uid", Term(1, 1), spares=1) in world.plan().send


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


def test_whatever_an_agent_says_the_status_can_still_be_written() -> None:
    """One that is too large for etcd could not be written any more, and its job not be mended."""
    world = running(resilience={"budgets": {"process": 100}})
    assert world.leader is not None
    long, lines = "█" * 100_000, ("first", *["█" * 100_000] * 500, "the last")
    seconds = {f"{part} {long}": 1.0 for part in range(100)}
    world.leader = replace(
        world.leader,
        faults=tuple(
            fault(1, number, cause=long, witness=long, message=long, log_tail=lines) for number in range(1, 13)
        ),
        recovered=(Recovered("6f0c-uid", Term(1, 13), seconds, steps_lost=0, at=START, source=long),),
    )
    everywhere = CorruptVerdict(
        "Permanent", tuple(range(100_000)), (), (long,) * 10_000, (long,) * 10_000, 1, 1, 1, 1.0, long, START
    )
    world.say(newest=summary(11, world.now), corrupt=(everywhere,) * 20, other_data=long, ledger=seconds)
    world.step()
    assert len(world.status.faults) == 10
    assert world.status.faults[-1].log_tail[-1] == "the last"
    size = stored(world)
    assert size < 1_200_000


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


def test_one_recovery_mends_all_losses_of_a_rack_and_is_counted_and_told_once() -> None:
    """One for each pod, each with all the time and the steps, would be as many writes of a large status."""
    world = running(nodes=100)
    for slot in range(1, 41):
        del world.pods[world.status.slots[str(slot)]]
    world.settle()
    world.say(newest=summary(9, world.now))
    world.settle()
    world.events.clear()
    assert world.leader is not None
    recovered = Recovered("6f0c-uid", Term(2, 1), {"restart": 10.0}, steps_lost=5, at=world.now, source="buddy")
    world.leader = replace(world.leader, recovered=(recovered,))
    world.step()
    assert world.plan().status == world.status
    *others, newest = world.status.faults
    assert (newest.seconds, newest.steps_lost) == ({"detect": 0.0, "restart": 10.0}, 5)
    assert len(others) == 39
    assert all((one.seconds, one.steps_lost) == ({"detect": 0.0}, 0) for one in others)
    assert {one.restored_from for one in world.status.faults} == {"buddy"}
    assert [event.reason for event in world.events] == ["Recovered"]
    assert describe(newest, world.status).endswith("a new pod took the slot in 10.0 s, 5 steps redone")
    assert describe(others[0], world.status).endswith("a new pod took the slot")


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


def test_a_rack_is_one_loss() -> None:
    world = running(nodes=32, spares=8)
    for number in range(8):
        world.take_down(f"node-{number + 10}")
    world.now += 6
    world.settle()
    assert (world.status.budgets_used.pod, world.status.restarts.spare) == (1, 8)
    assert len(world.status.slots) == 32


def test_members_lost_while_the_next_epoch_is_formed_are_the_same_loss() -> None:
    """And what is lost after it is another."""
    world = running(nodes=12)
    world.auto = False
    for number in range(1, 9):
        del world.pods[f"run-{number}-0"]
        world.step()
    assert (world.status.budgets_used.pod, world.status.restarts.pod) == (1, 8)
    world.auto = True
    world.run_pods()
    world.settle()
    lose_pods(world, 1)
    assert world.status.budgets_used.pod == 2


def test_a_maintenance_before_it_makes_no_loss_free() -> None:
    world = running(nodes=3)
    world.auto = False
    world.nodes["node-1"] = replace(world.nodes["node-1"], cordoned=True)
    world.pods["run-1-0"] = replace(world.pods["run-1-0"], deleting=True, deleted_at=world.now)
    world.step()
    assert world.status.budgets_used.pod == 0
    del world.pods["run-2-0"]
    world.step()
    assert world.status.budgets_used.pod == 1


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


SUSPECTED = "CorruptionSuspected"


def suspects(world: World, slot: int, *, generation: int = 1) -> str:
    """Ranks disagree, and the pod of ``slot`` is put aside to see whether it is wrong. Returns its node."""
    assert world.leader is not None
    node = world.pod_of(slot).node
    world.now += 5
    epoch = world.status.epoch
    report = fault(epoch, generation, cause=SUSPECTED, witness="arbiter", rung="pod", slot=slot, at=world.now)
    world.leader = replace(world.leader, faults=(report,), replace=replace_request(epoch, slot, cause=SUSPECTED))
    world.settle()
    return node


def excluded(world: World) -> list[tuple[str, str]]:
    return [(one.node, one.reason) for one in world.status.excluded_nodes]


def test_a_suspicion_keeps_pods_away_from_a_node_and_is_held_against_it_once_it_has_come_true() -> None:
    world = running(nodes=2, spares=1)
    node = suspects(world, 1)
    assert excluded(world) == [(node, SUSPECTED)]
    assert [(one.cause, one.rung) for one in world.status.faults] == [(SUSPECTED, "spare")]
    assert not told_by(world.job), "nothing is known yet"
    world.now += 30
    world.say(newest=summary(12, world.now), corrupt=(wrong_on(node, at=world.now),))
    world.settle()
    assert excluded(world) == [(node, "Corruption")]
    assert [(one.cause, one.message) for one in world.status.faults] == [("Corruption", "without it ranks agree")]
    assert [one.weight for one in told_by(world.job)[node]] == [THRESHOLD]
    world.now += 30
    other = suspects(world, 0)
    assert sorted(excluded(world)) == sorted([(node, "Corruption"), (other, SUSPECTED)])


def test_who_is_put_aside_while_ranks_still_disagree_is_cleared() -> None:
    world = running(nodes=2, spares=1)
    first = suspects(world, 1)
    second = suspects(world, 0)
    assert first != second
    assert excluded(world) == [(second, SUSPECTED)]
    assert [event.message for event in world.events if event.reason == "NodeReleased"] == [
        f"Pods of this job may come to {first} again: ranks disagree without it too."
    ]
    world.now += 30
    world.say(newest=summary(12, world.now), corrupt=(wrong_on(second, at=world.now),))
    world.settle()
    assert excluded(world) == [(second, "Corruption")]
    assert list(told_by(world.job)) == [second]


def test_an_older_verdict_on_the_node_makes_no_suspicion_true() -> None:
    world = running(nodes=2, spares=1)
    old = wrong_on(world.pod_of(1).node, at=world.now)
    world.say(newest=summary(11, world.now), corrupt=(old,))
    world.settle()
    node = suspects(world, 1)
    world.say(newest=summary(12, world.now), corrupt=(old,))
    world.settle()
    assert excluded(world) == [(node, SUSPECTED)]


def wrong_on(node: str, *, at: float) -> CorruptVerdict:
    """A verdict that a rank on that node computed wrong numbers."""
    return CorruptVerdict(
        kind="Permanent", ranks=(2,), pods=("run-1-0",), nodes=(node,), devices=(), since=11, step=11, seen=2,
        confidence=1.0, evidence="without it ranks agree", at=at, ended=at,
    )  # fmt: skip
