"""A user's script that ends in the same way again and again: its leader sees no steps, but how long it ran."""

from __future__ import annotations

from lockstep_api.messages import FaultReport, Inventory, Join, Membership, Quiesced, SlotInfo, Term, WorkerExited
from lockstep_trainer.agent.settings import Job
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, SendOperator
from lockstep_trainer.protocol.leader import Leader

JOB = "job"
SAID = ("Traceback (most recent call last):", '  File "train.py", line 3, in <module>', "ValueError: no closing tag")


def leading() -> Leader:
    """A leader whose only member runs a script, from 1 s on."""
    slot = SlotInfo(0, "pod", "uid", "boot", "10.0.0.1:1")
    spec = {"nodes": 1, "gpusPerNode": 1, "command": ["python", "train.py"]}
    leader = Leader(Job("job", "default", JOB, spec).plan(), Membership(JOB, 1, (slot,)), None, 0.0)
    leader.begin(0.0)
    leader.handle(events.OperatorConnected(), 0.0)
    here = Inventory(JOB, "pod", "uid", "boot", Term(1, 0), 1, 0, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(1, Join(JOB, 1, 0, here)), 0.0)
    start(leader, 1.0)
    return leader


def start(leader: Leader, now: float) -> None:
    """The next generation."""
    leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), now)
    if not leader.finished:
        leader.handle(events.StoreReady("10.0.0.1", 1), now)
        assert leader.running


def end(leader: Leader, now: float) -> list[Effect]:
    """The script raises an exception."""
    exited = WorkerExited(JOB, leader.term, 0, rank=0, exit_code=1, at=now, log_tail=SAID)
    effects = leader.handle(events.MemberSaid(1, exited), now)
    return effects + leader.handle(events.MemberSaid(1, Quiesced(JOB, leader.abandoned, 0)), now)


def test_the_third_end_in_a_row_ends_the_job_with_the_scripts_last_words() -> None:
    leader = leading()
    for now in (3.0, 6.0):
        reports = [one.message for one in end(leader, now) if isinstance(one, SendOperator)]
        assert any(isinstance(one, FaultReport) and one.message == SAID[-1] for one in reports)
        assert leader.finished is None
        start(leader, now + 1.0)
    end(leader, 9.0)
    assert leader.finished is not None
    assert (leader.finished.outcome, leader.finished.reason) == ("failed", "CrashLoop")
    assert SAID[-1] in leader.finished.message


def test_a_script_that_gets_further_each_time_is_started_again() -> None:
    leader, now = leading(), 1.0
    for ran in (10.0, 40.0, 160.0, 500.0):
        now += ran
        end(leader, now)
        assert leader.finished is None
        start(leader, now)
