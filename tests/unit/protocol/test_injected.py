"""A fault made on purpose reaches the leader, whatever becomes of streams, and counts once."""

from __future__ import annotations

from typing import Any

from lockstep_api.messages import (
    Injected,
    Injection,
    Inventory,
    Invite,
    Join,
    Membership,
    Quiesced,
    Rendezvous,
    SlotInfo,
    Start,
    Term,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, Journal, SendLeader
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader
from lockstep_trainer.protocol.member import Identity, Member, MemberMemory

JOB = "uid"
TERM = Term(1, 1)
MADE = Injection("0123456789ab", 1, 5.0, "it does not come to its next collective")
INFO = SlotInfo(0, "pod-0", "uid-0", "boot", "10.0.0.0:1", "node-0")


def said(effects: list[Effect]) -> list[Injected]:
    return [each.message for each in effects if isinstance(each, SendLeader) and isinstance(each.message, Injected)]


def test_a_member_says_it_at_once_and_again_on_each_stream() -> None:
    member = Member(Identity(JOB, "pod-0", "uid-0", "boot"), MemberMemory(), leaderless_seconds=60, now=0.0)
    member.handle(events.Invited(Invite(JOB, 1, 0, "uid-0", "boot", "10.0.0.0:1")), 1.0)
    assert said(member.handle(events.StreamOpened(1), 1.0)) == []
    start = Start(JOB, TERM, 1, 2, Rendezvous("10.0.0.0", 1, "1/1"), None)
    member.handle(events.LeaderSaid(1, start), 2.0)
    expected = [Injected(JOB, TERM, 0, (MADE,))]
    assert said(member.handle(events.FaultOrdered(MADE), 5.0)) == expected
    member.handle(events.StreamClosed(1), 6.0)
    assert said(member.handle(events.StreamOpened(1), 7.0)) == expected


def test_a_leader_writes_it_down_once_with_the_node_and_tells_the_operator() -> None:
    leader = Leader(JobPlan(JOB, 1, 2, steps=100, checkpoints=False), Membership(JOB, 1, (INFO,)), None, 0.0)
    lines: list[dict[str, Any]] = []

    def tell(event: events.LeaderEvent) -> None:
        lines.extend(each.line for each in leader.handle(event, 5.0) if isinstance(each, Journal))

    leader.begin(0.0)
    here = Inventory(JOB, INFO.pod, INFO.pod_uid, "boot", Term(1, 0), 0, 0, None, 0, None, 1, 1)
    tell(events.MemberConnected(0, Join(JOB, 1, 0, here)))
    tell(events.MemberSaid(0, Quiesced(JOB, leader.abandoned, 0)))
    tell(events.StoreReady("10.0.0.0", 1))
    for _ in range(2):
        tell(events.MemberSaid(0, Injected(JOB, leader.term, 0, (MADE,))))
    (line,) = [line for line in lines if line["kind"] == "injected"]
    assert (line["rank"], line["node"], line["what"]) == (1, "node-0", MADE.what)
    assert [one.id for one in leader.reports.injected] == [MADE.id]
