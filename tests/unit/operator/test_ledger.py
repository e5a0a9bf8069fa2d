"""Every GPU-second that a pod was held is in exactly one class."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lockstep_operator.plan import ledger
from unit.operator.builders import World, finished, make_job, replace_request, running, summary


def held(world: World, last: dict[str, float]) -> None:
    """Add what each pod was held since the last time, as a bystander with a stop-watch would."""
    for name, pod in world.pods.items():
        since = max(last.get(name, pod.created), pod.created)
        last["total"] = last.get("total", 0.0) + max(0.0, world.now - since) * 2
        last[name] = world.now


@pytest.mark.parametrize("seed", range(20))
def test_the_classes_sum_to_the_time_that_pods_were_held(seed: int) -> None:
    """Over random histories of steps, losses, reports and operator restarts."""
    chance = random.Random(seed)
    world = World(make_job(nodes=3, spares=1, resilience={"budgets": {"pod": 1000}}))
    last: dict[str, float] = {}
    totals: dict[str, float] = {}
    epoch = 0
    for _ in range(60):
        world.settle()
        if world.status.epoch != epoch:
            epoch, totals = world.status.epoch, {}
        passed = chance.uniform(0.1, 5)
        world.now += passed
        if world.leader and world.leader.connected and world.status.slot_map_hash:
            # A leader that reports late knows a little less than what has passed.
            name = chance.choice(["productive", "dataWait", "recovering", "recomputing"])
            totals = {**totals, name: totals.get(name, 0.0) + 3 * 2 * passed * chance.uniform(0.8, 1.0)}
            world.say(newest=summary(1, world.now), ledger=totals, connected=3)
        held(world, last)
        world.step()
        if chance.random() < 0.2:
            name = chance.choice(sorted(world.pods))
            del world.pods[name]
        if chance.random() < 0.1:
            world.new_operator()
    world.settle()
    assert sum(world.status.ledger.values()) == pytest.approx(last["total"], abs=0.1)
    assert all(value >= 0 for value in world.status.ledger.values())


def test_whatever_classes_leaders_name_some_are_kept_and_all_time_is_counted() -> None:
    """Each epoch's are added to those before: without a bound the status would outgrow what etcd takes."""
    world = running(nodes=1)
    for epoch in range(4):
        world.now += 100
        totals = {f"{epoch} {number} {'x' * 1000}": 2.0 for number in range(100)}
        world.say(newest=summary(11, world.now), ledger=totals)
        world.step()
        assert sum(world.status.ledger.values()) == pytest.approx(200.0 * (epoch + 1))
        del world.pods[world.status.slots["0"]]
        world.settle()
    assert len(world.status.ledger) <= 33
    assert len(world.status.ledger_state.base) <= 33
    assert max(map(len, world.status.ledger)) == 253


def test_goodput_leaves_waiting_for_room_out() -> None:
    world = World(make_job(nodes=1), auto=False)
    world.step()
    world.now += 100
    world.step()
    assert world.status.ledger == {"queued": 200.0}
    assert world.status.goodput is None
    world.auto = True
    world.run_pods()
    world.settle()
    world.now += 100
    world.say(newest=summary(1, world.now), ledger={"productive": 150.0, "dataWait": 50.0}, connected=1)
    world.settle()
    assert world.status.ledger == {"dataWait": 50.0, "productive": 150.0, "queued": 200.0}
    assert world.status.goodput == 0.75
    assert world.status.goodput_percent == "75.0%"


def test_a_report_of_an_older_epoch_is_dropped() -> None:
    world = World(make_job(nodes=2))
    world.train()
    world.say(newest=summary(2, world.now), ledger={"productive": 10.0})
    world.now += 5
    world.settle()
    old = world.leader
    assert old is not None
    world.leader = replace(old, replace=replace_request(1, 1))
    world.settle()
    assert world.leader is not None
    world.leader = replace(world.leader, progress=old.progress)  # the old epoch's totals, late
    world.now += 5
    world.settle()
    assert world.status.ledger["productive"] == 10.0


def test_a_leader_that_counts_from_nothing_again_loses_nothing() -> None:
    world = World(make_job(nodes=2))
    world.train()
    world.now += 100
    world.say(newest=summary(2, world.now), ledger={"productive": 400.0})
    world.settle()
    world.now += 10
    world.say(newest=summary(3, world.now), ledger={"productive": 40.0})
    world.settle()
    assert world.status.ledger["productive"] == 440.0


def test_time_until_a_loss_was_noticed_is_detecting_and_after_it_recovering() -> None:
    world = World(make_job(nodes=2))
    world.train()
    world.now += 100
    world.say(newest=summary(2, world.now), ledger={"productive": 400.0})
    world.settle()
    world.now += 7
    assert world.leader is not None
    world.leader = replace(world.leader, replace=replace_request(1, 1))
    world.auto = False
    world.step()
    assert world.status.ledger == {"detecting": 28.0, "productive": 400.0}
    world.now += 10
    world.step()
    assert world.status.ledger["recovering"] == 20.0  # the survivor
    assert world.status.ledger["queued"] == 20.0  # the new pod


def test_an_idle_spare_is_counted_as_such() -> None:
    world = World(make_job(nodes=1, spares=1))
    world.train()
    world.now += 10
    world.say(newest=summary(2, world.now), ledger={"productive": 20.0}, connected=1)
    world.settle()
    assert world.status.ledger == {"idleSpare": 20.0, "productive": 20.0}


def test_nothing_is_added_after_the_end() -> None:
    world = World(make_job(nodes=1))
    world.train()
    world.now += 10
    assert world.leader is not None
    world.leader = replace(world.leader, finished=finished(1))
    world.settle()
    before = world.status.ledger
    world.now += 100
    world.settle()
    assert world.status.ledger == before


def test_classes_have_one_spelling() -> None:
    """The agents' classes and the operator's must meet in one ledger."""
    from lockstep_trainer.protocol import ledger as agents

    shared = {"STARTING", "RECOVERING", "DETECTING", "PRODUCTIVE", "UNATTRIBUTED"}
    assert {getattr(ledger, name) for name in shared} == {getattr(agents, name) for name in shared}
