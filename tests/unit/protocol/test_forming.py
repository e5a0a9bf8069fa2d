"""An epoch forms: who is late is waited for as long as others still arrive, and no longer."""

from __future__ import annotations

from lockstep_api.messages import Inventory, Join, Membership, ReplaceRequest, SlotInfo, Term
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, SendOperator
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader

JOB = "job"
GRACE = 5.0
SLOTS = tuple(SlotInfo(slot, f"pod-{slot}", f"uid-{slot}", "boot", f"10.0.0.{slot}:1") for slot in range(4))


def forming() -> Leader:
    leader = Leader(JobPlan(JOB, 4, 1, steps=100, rejoin_grace=GRACE), Membership(JOB, 1, SLOTS), None, 0.0)
    leader.begin(0.0)
    return leader


def comes(leader: Leader, slot: int, now: float) -> None:
    inventory = Inventory(JOB, f"pod-{slot}", f"uid-{slot}", "boot", Term(1, 0), None, slot, None, 0, None, 1, 1)
    leader.handle(events.MemberConnected(slot, Join(JOB, 1, slot, inventory)), now)


def given_up(leader: Leader, now: float) -> tuple[int, ...]:
    """Whom the operator is asked to replace at ``now``."""
    for peer in leader.roster.members.values():
        if peer.connection is not None:  # who has come goes on speaking
            leader.roster.heard(peer.connection, now)
    effects: list[Effect] = leader.handle(events.Tick(), now)
    asked = [effect.message for effect in effects if isinstance(effect, SendOperator)]
    return next((message.slots for message in asked if isinstance(message, ReplaceRequest)), ())


def test_nobody_is_given_up_before_the_leaders_own_member_has_come() -> None:
    """It is in the leader's own process: where even it is late, the leader itself is slow."""
    leader = forming()
    assert given_up(leader, 60.0) == ()
    comes(leader, 0, 61.0)
    assert given_up(leader, 61.0 + GRACE - 0.1) == ()
    assert given_up(leader, 61.0 + GRACE + 0.1) == (1, 2, 3)


def test_the_grace_counts_from_the_last_arrival() -> None:
    """One handshake after the other, each just within the grace: nobody is lost who is only waiting its turn."""
    leader = forming()
    for slot in (0, 1, 2):
        assert given_up(leader, slot * (GRACE - 0.1)) == ()
        comes(leader, slot, slot * (GRACE - 0.1))
    assert given_up(leader, 3 * (GRACE - 0.1)) == ()
    assert given_up(leader, 3 * (GRACE - 0.1) + 0.2) == (3,)


def test_a_member_that_comes_and_goes_holds_up_nobody() -> None:
    """Only its first arrival counts."""
    leader = forming()
    for slot in (0, 1, 2):
        comes(leader, slot, 1.0)
    for now in (3.0, 5.0):
        leader.handle(events.MemberClosed(2), now)
        comes(leader, 2, now + 0.5)
    assert given_up(leader, 1.0 + GRACE + 0.1) == (3,)
