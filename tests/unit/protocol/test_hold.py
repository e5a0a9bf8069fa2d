"""Who asks for a stop that costs no step: workers make none behind the last state, from the leader to the worker."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lockstep_api.messages import Invite, Rendezvous, Start, StateId, Steps, StepSummary, Stop, TakeSnapshot, Term
from lockstep_trainer.checkpoint.request import NAME, Request, Requests, ask
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, RequestSnapshot, SendMember
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.member import Identity, Member, MemberMemory
from unit.protocol.test_guards import JOB, leading


def asked(effects: list[Effect]) -> list[TakeSnapshot]:
    sent = [each.message for each in effects if isinstance(each, SendMember)]
    return [message for message in sent if isinstance(message, TakeSnapshot)]


def stepping(step: int = 7) -> Leader:
    leader = leading()
    steps(leader, step, 2.0)
    return leader


def steps(leader: Leader, step: int, now: float) -> None:
    done = StepSummary(step, now - 0.1, 0.1, 2.0, 256, 1.0, 1e-3)
    leader.handle(events.MemberSaid(1, Steps(JOB, leader.term, 0, (done,), "forward")), now)


@pytest.mark.parametrize("hold", [True, False])
def test_the_leader_says_it_with_the_request_and_again_with_each_repetition(hold: bool) -> None:
    leader = stepping()
    first = asked(leader.handle(events.OperatorSaid(Stop(JOB, 1, "a move", seconds=60.0, hold=hold)), 3.0))
    steps(leader, 8, 5.4)
    again = asked(leader.handle(events.Tick(), 5.5))
    assert [message.hold for message in (*first, *again)] == [hold, hold]


def test_a_generation_that_is_started_anew_waits_for_nobody() -> None:
    """It begins from the very state that the stop waited for, only to bring it to the store."""
    leader = stepping()
    leader.handle(events.OperatorSaid(Stop(JOB, 1, "a move", seconds=60.0, hold=True)), 3.0)
    assert leader.running is not None
    leader.keeping.started(leader, leader.running)
    assert [message.hold for message in asked(leader.keeping.take(leader, 9.0))] == [False]


@pytest.mark.parametrize("hold", [True, False])
def test_a_member_hands_it_on(hold: bool) -> None:
    member = Member(Identity(JOB, "pod", "uid", "boot"), MemberMemory(), leaderless_seconds=20.0, now=0.0)
    member.handle(events.Invited(Invite(JOB, 1, 0, "uid", "boot", "10.0.0.1:1")), 0.0)
    member.handle(events.StreamOpened(1), 0.0)
    term = Term(1, 1)
    member.handle(events.LeaderSaid(1, Start(JOB, term, 1, 1, Rendezvous("10.0.0.1", 1, "1/1"), None)), 1.0)
    told = member.handle(events.LeaderSaid(1, TakeSnapshot(JOB, term, hold)), 2.0)
    assert RequestSnapshot(term, hold) in told


def test_a_worker_sees_each_request_once_and_none_from_before_its_time(tmp_path: Path) -> None:
    ask(tmp_path, hold=True)
    before = time.time_ns() - 10**9
    os.utime(tmp_path / NAME, ns=(before, before))
    requests = Requests(tmp_path)
    assert requests.look() is None
    for number, hold in enumerate((True, False), start=1):
        ask(tmp_path, hold=hold)
        later = time.time_ns() + number * 10**9
        os.utime(tmp_path / NAME, ns=(later, later))
        assert requests.look() == Request(hold=hold)
        assert requests.look() is None


def test_a_request_of_an_agent_that_only_touches_the_file_is_one_without_waiting(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    (tmp_path / NAME).touch()
    later = time.time_ns() + 10**9
    os.utime(tmp_path / NAME, ns=(later, later))
    assert requests.look() == Request(hold=False)


def test_what_is_kept_before_the_stop_is_behind_it_is_not_the_last_state() -> None:
    """Steps that were heard of by then are not to be lost either."""
    leader = stepping(step=7)
    leader.handle(events.OperatorSaid(Stop(JOB, 1, "a move", seconds=60.0, hold=True)), 3.0)
    assert leader.keeping.uploads.asked == StateId(7, 1, 1).step
