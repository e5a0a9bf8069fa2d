"""Rules that other rules nearly always make up for: random schedules do not get to what they are for, so each is tried
alone. ``simulation.mutations`` changes them one by one and runs these tests."""

from __future__ import annotations

from lockstep_api.messages import (
    Inventory,
    Join,
    Membership,
    Quiesced,
    RestorePoint,
    SlotInfo,
    Staged,
    StateId,
    Term,
    Upload,
    WorkerExited,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.durability import Durability, Pending
from lockstep_trainer.protocol.effects import Commit, Effect, SendMember
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.lineage import Lineage

JOB = "job"
SLOT = SlotInfo(0, "pod", "uid", "boot", "10.0.0.1:1")


def leading(generations: int = 1) -> Leader:
    """A leader of one member, whose newest generation of that many runs."""
    plan = JobPlan(JOB, 1, 1, steps=100, checkpoint_every=10, memory_buddy=False)
    leader = Leader(plan, Membership(JOB, 1, (SLOT,)), None, 0.0)
    leader.begin(0.0)
    here = Inventory(JOB, "pod", "uid", "boot", Term(1, 0), 1, 0, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join(JOB, 1, 0, here)), 0.0)
    leader.handle(events.RestoreChosen(leader.abandoned, None), 0.0)
    for generation in range(1, generations + 1):
        leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), float(generation))
        leader.handle(events.StoreReady("10.0.0.1", generation), float(generation))
        assert leader.running is not None
        assert leader.term == Term(1, generation)
        if generation < generations:
            leader.handle(events.StoreLost("killed"), generation + 0.5)
    return leader


def test_the_end_of_an_older_generation_s_worker_is_no_fault_of_this_one() -> None:
    """Said again by a member whose stream was cut between its workers' end and the new start."""
    leader = leading(generations=2)
    leader.handle(events.MemberSaid(1, WorkerExited(JOB, Term(1, 1), 0, 0, -9)), 3.0)
    assert leader.running is not None
    assert leader.running.term == Term(1, 2)
    leader.handle(events.MemberSaid(1, WorkerExited(JOB, Term(1, 2), 0, 0, -9)), 3.1)
    assert leader.running is None or leader.running.term > Term(1, 2)


def test_what_no_generation_descends_from_is_not_committed() -> None:
    """Its files are whole, and its parent is what the chain names: only the lineage tells that it must not be there."""
    durability = Durability(enabled=True)
    durability.choose(Term(1, 0), 0.0)
    durability.chosen(events.RestoreChosen(Term(1, 0), None), 0.0)
    first = Lineage().grown(Term(1, 1), None)
    durability.begin(first)
    state = StateId(20, 1, 1)
    assert commits(durability.ready(Pending(state, None, "{}", ()), Term(1, 1), 1.0)) == [state]
    durability.failed("no answer", superseded=False, now=2.0)
    again = Durability.push(durability, Term(1, 1), 60.0)
    assert commits(again) == [state], "while the generation goes on it is tried again"
    durability.failed("no answer", superseded=False, now=61.0)
    durability.begin(first.grown(Term(1, 2), None))  # all copies are lost: from fresh weights
    assert commits(durability.push(Term(1, 2), 600.0)) == []


def test_an_order_whose_parent_the_chain_does_not_name_is_dropped() -> None:
    """What is uploaded for it says that it descends from a state that the chain has left."""
    leader = leading()
    state = StateId(10, 1, 1)
    told = leader.handle(events.MemberSaid(1, Staged(JOB, leader.term, 0, state, True)), 2.0)
    assert [order.state for order in orders(told)] == [state]
    assert leader.keeping.uploads.order is not None
    other = RestorePoint(StateId(5, 1, 1), "step-5-e1-g1/manifest.json", "00")
    leader.durability.known = False
    leader.durability.choose(leader.term, 3.0)
    leader.handle(events.RestoreChosen(leader.term, other), 3.0)
    order = leader.keeping.uploads.order
    assert order is None or order.parent == other


def commits(effects: list[Effect]) -> list[StateId]:
    return [effect.state for effect in effects if isinstance(effect, Commit)]


def orders(effects: list[Effect]) -> list[Upload]:
    found = [effect.message for effect in effects if isinstance(effect, SendMember)]
    return [message for message in found if isinstance(message, Upload)]
