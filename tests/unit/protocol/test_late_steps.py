"""Steps that were made before their generation was given up, and are heard of behind that: a snapshot of the last one
may be whole, and then nobody makes it again. Without their lines the journal has holes."""

from __future__ import annotations

from lockstep_api.messages import Abandon, Invite, Quiesced, Rendezvous, Start, Steps, StepSummary, Term
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, Journal, SendLeader
from lockstep_trainer.protocol.member import Identity, Member, MemberMemory
from unit.protocol.test_guards import leading

JOB = "job"


def step(number: int) -> StepSummary:
    return StepSummary(number, 1.0 + number / 10, 0.1, 2.0, 256, 1.0, 1e-3)


def lines(effects: list[Effect]) -> list[int]:
    said = [effect.line for effect in effects if isinstance(effect, Journal)]
    return [line["step"] for line in said if line["kind"] == "step"]


def test_a_step_that_is_told_while_workers_leave_has_a_line_of_its_own_generation() -> None:
    leader = leading()
    leader.handle(events.MemberSaid(1, Steps(JOB, leader.term, 0, (step(1),), "forward")), 2.0)
    leader.handle(events.StoreLost("killed"), 2.1)
    told = leader.handle(events.MemberSaid(1, Steps(JOB, leader.abandoned, 0, (step(2),), "forward")), 2.2)
    assert lines(told) == [2]
    assert (leader.ledger.highest, leader.recovery and leader.recovery.highest) == (2, 2), "it is done again, if it is"
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), 2.3)
    leader.handle(events.StoreReady("10.0.0.1", 2), 2.3)
    assert leader.term == Term(1, 2)
    assert lines(leader.handle(events.MemberSaid(1, Steps(JOB, Term(1, 1), 0, (step(3),), "forward")), 2.4)) == []


def test_a_member_tells_a_new_leader_of_the_last_steps_although_their_workers_are_gone() -> None:
    """The leader's agent may have died with what it had heard of them."""
    member = Member(Identity(JOB, "pod", "uid", "boot"), MemberMemory(), leaderless_seconds=20.0, now=0.0)
    member.handle(events.Invited(Invite(JOB, 1, 0, "uid", "boot", "10.0.0.1:1")), 0.0)
    member.handle(events.StreamOpened(1), 0.0)
    member.handle(events.LeaderSaid(1, Start(JOB, Term(1, 1), 1, 1, Rendezvous("10.0.0.1", 1, "1/1"), None)), 0.0)
    member.handle(events.WorkersStepped(Term(1, 1), (step(1), step(2)), "forward"), 1.0)
    member.handle(events.LeaderSaid(1, Abandon(JOB, Term(1, 1), "test")), 2.0)
    member.handle(events.WorkerEnded(Term(1, 1), 0, -9, 2.1), 2.1)
    assert member.workers.running is None
    member.handle(events.StreamClosed(1), 3.0)
    said = [effect.message for effect in member.handle(events.StreamOpened(1), 4.0) if isinstance(effect, SendLeader)]
    (told,) = [message for message in said if isinstance(message, Steps)]
    assert (told.term, [done.step for done in told.done]) == (Term(1, 1), [1, 2])
