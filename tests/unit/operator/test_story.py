"""What `kubectl describe` shows of a fault: what broke, what is done about it, what it cost; each once."""

from __future__ import annotations

from dataclasses import replace

from lockstep_api.messages import CorruptVerdict, Injection, OutlierVerdict, Recovered, SlowVerdict, Term
from unit.operator.builders import START, World, fault, make_job

STUCK = "rank 3 keeps the others waiting: it is in loader.py:88 batch (step 7, section load)"


def test_a_fault_and_its_recovery_are_events_once() -> None:
    world = World(make_job(nodes=3))
    world.train(step=10)
    world.events.clear()
    assert world.leader is not None
    stuck = fault(1, 1, cause="Hang", witness="progress", exit_code=None, message=STUCK, detect_seconds=60.0)
    world.leader = replace(world.leader, faults=(stuck,))
    world.settle()
    (event,) = world.events
    assert (event.type, event.reason) == ("Warning", "Hang")
    assert event.message == (
        f"No step was finished in time (rank 3, run-1-0, node node-1): {STUCK}; its workers are started again in place."
    )
    world.events.clear()
    recovered = Recovered(
        "6f0c-uid", Term(1, 2), {"restart": 0.5, "restore": 1.5}, steps_lost=1, at=START, source="buddy"
    )
    world.leader = replace(world.leader, recovered=(recovered,))
    world.settle()
    (event,) = world.events
    assert (event.type, event.reason) == ("Normal", "Recovered")
    assert event.message == (
        "Training goes on from the memory of a buddy, 62.0 s after no step was finished in time "
        "(detect 60.0, restart 0.5, restore 1.5), 1 step redone."
    )


def test_a_lost_pod_is_told_by_who_gives_it_up() -> None:
    world = World(make_job(nodes=2))
    world.train(step=10)
    world.events.clear()
    del world.pods["run-1-0"]
    world.settle()
    assert [event.reason for event in world.events if event.type == "Warning"] == ["PodLost"]


def test_a_slow_rank_is_an_event_once_and_so_is_its_end() -> None:
    world = World(make_job(nodes=2))
    world.train(step=100)
    world.events.clear()
    found = SlowVerdict("Compute", (3,), ("node-1",), 40, 0.5, 0.2, "Its product took 50 % longer.", START)
    assert world.leader is not None
    assert world.leader.progress is not None
    progress = world.leader.progress
    world.leader = replace(world.leader, progress=replace(progress, slow=(found,)))
    world.settle()
    (event,) = world.events
    assert (event.type, event.reason) == ("Warning", "SlowRank")
    assert event.message == (
        "Rank 3 (node node-1) is slowed down by a slow device at its full clock since step 40: 50% longer, at a cost "
        "of 20.0% of the job's step time. Its product took 50 % longer."
    )
    world.events.clear()
    world.leader = replace(world.leader, progress=replace(progress, slow=(replace(found, ended=START + 60),)))
    world.settle()
    (event,) = world.events
    assert (event.type, event.reason) == ("Normal", "SlowRankEnded")


def test_what_a_new_leader_does_not_know_is_over() -> None:
    world = World(make_job(nodes=2))
    world.train(step=100)
    found = SlowVerdict("Pauses", (), (), 40, 0.5, 0.2, "Collect garbage less often.", START)
    assert world.leader is not None
    assert world.leader.progress is not None
    progress = world.leader.progress
    world.leader = replace(world.leader, progress=replace(progress, slow=(found,)))
    world.settle()
    world.leader = replace(world.leader, progress=progress)
    world.settle()
    (verdict,) = world.job.status.verdicts
    assert verdict.ended is not None


def test_a_corrupt_rank_is_an_event_with_its_gpu_and_so_is_one_that_was_put_aside_at_once() -> None:
    world = World(make_job(nodes=2))
    world.train(step=100)
    world.events.clear()
    found = CorruptVerdict(
        "Permanent", (3,), ("run-1-0",), ("node-1",), ("serial 16",), 40, 40, 1, 1.0, "unit 1 was outvoted", START
    )
    assert world.leader is not None
    assert world.leader.progress is not None
    progress = world.leader.progress
    world.leader = replace(world.leader, progress=replace(progress, corrupt=(found,)))
    world.settle()
    (event,) = world.events
    assert (event.type, event.reason) == ("Warning", "CorruptRank")
    assert event.message == (
        "Rank 3 (node node-1, GPU serial 16) computed wrong numbers, first at step 40, each time that it was looked "
        "at. Unit 1 was outvoted."
    )
    world.events.clear()
    among = replace(found, kind="Undecided", ranks=(0, 1), devices=(), confidence=0.0, at=START + 1, ended=START + 2)
    world.leader = replace(world.leader, progress=replace(progress, corrupt=(found, among)))
    world.settle()
    (event,) = world.events
    assert event.message.startswith(
        "Ranks 0, 1 (node node-1) disagree about the same numbers, first at step 40, and nobody can say who is wrong."
    )
    assert [(one.kind, one.cause) for one in world.job.status.verdicts] == [
        ("Corrupt", "Permanent"),
        ("Corrupt", "Undecided"),
    ]


def test_a_fault_made_on_purpose_is_an_event_once_and_outlives_the_leader_that_knew_it() -> None:
    world = World(make_job(nodes=2))
    world.train(step=100)
    world.events.clear()
    made = Injection("0123456789ab", 3, START, "it does not come to its next collective", "node-1")
    assert world.leader is not None
    assert world.leader.progress is not None
    progress = world.leader.progress
    for heard in ((made,), (), (made,)):
        world.leader = replace(world.leader, progress=replace(progress, injected=heard))
        world.settle()
    (event,) = world.events
    assert (event.type, event.reason) == ("Warning", "FaultInjected")
    assert event.message == (
        "A fault made on purpose, by `lockstep inject`, on rank 3 (node node-1): it does not come to its next "
        "collective."
    )
    assert [one.id for one in world.job.status.injections] == [made.id]


def test_an_unusual_figure_is_an_event_of_the_whole_job() -> None:
    world = World(make_job(nodes=2))
    world.train(step=100)
    world.events.clear()
    found = OutlierVerdict("gradientNorm", 40, "the gradient's norm is 80, 80 times its median of 1", START)
    assert world.leader is not None
    assert world.leader.progress is not None
    world.leader = replace(world.leader, progress=replace(world.leader.progress, outliers=(found,)))
    world.settle()
    (event,) = world.events
    assert (event.type, event.reason) == ("Warning", "UnusualFigure")
    assert event.message == (
        "The gradient's norm was unusually large from step 40 on. The gradient's norm is 80, 80 times its median of 1."
    )
    (verdict,) = world.job.status.verdicts
    assert (verdict.kind, verdict.cause, verdict.ranks, verdict.nodes) == ("Outlier", "gradientNorm", [], [])
