"""Workers that leave a generation and go on with the next one in the same process."""

from __future__ import annotations

import pytest

from lockstep_api.messages import (
    Abandon,
    FaultReport,
    Inventory,
    Invite,
    Join,
    Membership,
    Quiesced,
    Release,
    Rendezvous,
    SlotInfo,
    Start,
    Term,
    WorkerExited,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, Kill, Launch, Leave, SendLeader, SendMember
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.member import Identity, Member, MemberMemory
from lockstep_trainer.protocol.policy import PEER_LOST_EXIT

JOB = "job"
SLOT = SlotInfo(0, "pod", "uid", "boot", "10.0.0.1:1")


def start(generation: int) -> Start:
    return Start(JOB, Term(1, generation), 1, 2, Rendezvous("10.0.0.1", 1, f"1/{generation}"), None)


def working() -> Member:
    """A member of one slot, whose two workers of generation 1 run."""
    member = Member(Identity(JOB, "pod", "uid", "boot"), MemberMemory(), leaderless_seconds=20.0, now=0.0)
    invite = Invite(JOB, 1, 0, "uid", "boot", "10.0.0.1:1")
    member.handle(events.Invited(invite), 0.0)
    member.handle(events.StreamOpened(1), 0.0)
    said = member.handle(events.LeaderSaid(1, start(1)), 0.0)
    assert any(isinstance(effect, Launch) for effect in said)
    return member


def leave(member: Member) -> list[Effect]:
    return member.handle(events.LeaderSaid(1, Abandon(JOB, Term(1, 1), "test")), 1.0)


def quiesced(effects: list[Effect]) -> list[Quiesced]:
    said = [effect.message for effect in effects if isinstance(effect, SendLeader)]
    return [message for message in said if isinstance(message, Quiesced)]


def test_a_member_is_quiet_once_all_its_workers_rest_or_have_ended() -> None:
    member = working()
    assert Leave(Term(1, 1)) in leave(member)
    assert not quiesced(member.handle(events.WorkerIdle(Term(1, 1), 0, 1.1), 1.1))
    assert Leave(Term(1, 1)) in member.handle(events.Tick(), 1.2)  # said again while one is missing
    (said,) = quiesced(member.handle(events.WorkerEnded(Term(1, 1), 1, -9, 1.3), 1.3))
    assert said.resting == 1


@pytest.mark.parametrize(
    ("code", "ours", "told"), [(-9, True, False), (-9, False, True), (-11, True, True), (0, True, False)]
)
def test_who_else_killed_a_worker_is_told_although_it_was_reaped_behind_the_order_to_leave(
    code: int, ours: bool, told: bool
) -> None:
    """The kernel's OOM killer, say: others lose it, and the generation is over, before its memory is given back."""
    member = working()
    leave(member)
    effects = member.handle(events.WorkerEnded(Term(1, 1), 1, code, 1.3, ours=ours), 1.3)
    ends = [effect.message for effect in effects if isinstance(effect, SendLeader)]
    assert [end.exit_code for end in ends if isinstance(end, WorkerExited)] == ([code] if told else [])


def test_a_worker_that_left_unasked_is_a_fault_like_one_that_ended_by_it() -> None:
    member = working()
    (effect,) = member.handle(events.WorkerIdle(Term(1, 1), 1, 0.5, "connection reset"), 0.5)
    assert isinstance(effect, SendLeader)
    assert isinstance(effect.message, WorkerExited)
    assert (effect.message.rank, effect.message.exit_code, effect.message.at) == (1, PEER_LOST_EXIT, 0.5)
    (said,) = quiesced([*leave(member), *member.handle(events.WorkerIdle(Term(1, 1), 0, 1.1), 1.1)])
    assert said.resting == 2


def test_what_an_older_generation_s_worker_says_is_not_about_this_one() -> None:
    member = working()
    leave(member)
    for rank in (0, 1):
        member.handle(events.WorkerIdle(Term(1, 1), rank, 1.1), 1.1)
    member.handle(events.LeaderSaid(1, start(2)), 2.0)
    assert member.handle(events.WorkerIdle(Term(1, 1), 0, 1.1), 2.1) == []
    assert member.workers.live == {0, 1}


def test_who_is_released_ends_its_workers_those_that_rest_too() -> None:
    member = working()
    leave(member)
    for rank in (0, 1):
        member.handle(events.WorkerIdle(Term(1, 1), rank, 1.1), 1.1)
    assert Kill(Term(1, 1)) in member.handle(events.LeaderSaid(1, Release(JOB, Term(1, 1), "over")), 2.0)


def test_a_fault_in_which_all_workers_stay_is_answered_in_process_and_the_next_time_by_new_processes() -> None:
    plan = JobPlan(JOB, 1, 2, steps=100, checkpoint_every=10, memory_buddy=False)
    leader = Leader(plan, Membership(JOB, 1, (SLOT,)), None, 0.0)
    leader.begin(0.0)
    here = Inventory(JOB, "pod", "uid", "boot", Term(1, 0), 1, 0, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join(JOB, 1, 0, here)), 0.0)
    leader.handle(events.RestoreChosen(leader.abandoned, None), 0.0)
    answers, starts = [], []
    for generation in range(4):
        if generation:
            lost = WorkerExited(JOB, leader.term, 0, 1, PEER_LOST_EXIT, "lost")
            leader.handle(events.MemberSaid(1, lost), float(generation))
        resting = 2 if generation < 3 else 1
        effects = leader.handle(
            events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0, resting=resting)), generation + 0.5
        )
        effects += leader.handle(events.StoreReady("10.0.0.1", generation), generation + 0.6)
        starts += [e.message for e in effects if isinstance(e, SendMember) and isinstance(e.message, Start)]
        answers = [report.rung for report in leader.reports.unacknowledged if isinstance(report, FaultReport)]
    assert answers == ["inProcess", "process", "pod"]
    assert [each.fresh for each in starts] == [False, False, True]
