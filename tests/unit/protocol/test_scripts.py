"""A user's script that ends in the same way again and again: its leader sees no steps, but how long it ran."""

from __future__ import annotations

from lockstep_api import tails
from lockstep_api.messages import FaultReport, Inventory, Join, Membership, Quiesced, SlotInfo, Term, WorkerExited
from lockstep_trainer.agent.settings import Job
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, SendOperator
from lockstep_trainer.protocol.leader import Leader

JOB = "job"
SAID = ("Traceback (most recent call last):", '  File "train.py", line 3, in <module>', "ValueError: no closing tag")


LONG = tuple(f'{{"step": {number}, "stack": "{"x" * 1000}", "error": "ConnectionReset"}}' for number in range(40))
"""Of a structured logger: what counts stands far behind."""


def leading(*rules: dict[str, object]) -> Leader:
    """A leader whose only member runs a script, from 1 s on."""
    slot = SlotInfo(0, "pod", "uid", "boot", "10.0.0.1:1")
    spec = {"nodes": 1, "gpusPerNode": 1, "command": ["python", "train.py"], "resilience": {"retry": list(rules)}}
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


def end(leader: Leader, now: float, said: tuple[str, ...] = SAID) -> list[Effect]:
    """The script raises an exception."""
    exited = WorkerExited(JOB, leader.term, 0, rank=0, exit_code=1, at=now, log_tail=said)
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


def test_a_rule_finds_its_pattern_far_behind_in_a_line() -> None:
    leader = leading({"action": "Fail", "logPattern": "ConnectionRes.t"})
    end(leader, 3.0, LONG)
    assert leader.finished is not None
    assert (leader.finished.outcome, leader.finished.reason) == ("failed", "FatalLogPattern")


def test_a_leader_that_takes_over_judges_by_all_that_was_told() -> None:
    leader = leading({"action": "Fail", "logPattern": "ConnectionRes.t"})
    exited = WorkerExited(JOB, leader.term, 0, rank=0, exit_code=1, at=3.0, log_tail=LONG)
    leader.handle(events.MemberSaid(1, exited), 3.0)
    after = Leader(leader.plan, leader.membership, leader.memory(), 4.0)
    after.begin(4.0)
    here = Inventory(JOB, "pod", "uid", "boot", leader.term, 1, 0, None, 0, None, 2, 1)
    after.handle(events.OperatorConnected(), 4.0)
    after.handle(events.MemberConnected(1, Join(JOB, 1, 0, here)), 4.0)
    after.handle(events.MemberSaid(1, Quiesced(JOB, after.abandoned, 0)), 4.0)
    assert after.finished is not None
    assert after.finished.reason == "FatalLogPattern"


def test_what_a_rule_found_is_remembered_and_of_the_lines_no_more_than_a_status_takes() -> None:
    """Such ends in a row do not end the job: each of them is known to be harmless."""
    leader, now = leading({"action": "Restart", "logPattern": "ConnectionRes.t"}), 3.0
    for _ in range(4):
        (report,) = [
            one.message
            for one in end(leader, now, LONG)
            if isinstance(one, SendOperator) and isinstance(one.message, FaultReport)
        ]
        assert leader.finished is None
        assert list(report.log_tail) == tails.tail(LONG)
        assert leader.verdicts.history[-1].log_tail == report.log_tail
        start(leader, now + 1.0)
        now += 3.0
