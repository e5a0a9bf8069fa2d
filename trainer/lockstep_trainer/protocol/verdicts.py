"""Faults of one epoch on their way to a decision: who is suspected, what was decided, who is to be replaced."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lockstep_trainer.protocol import policy
from lockstep_trainer.protocol.policy import Decision, Fault, Ladder
from lockstep_trainer.protocol.roster import Roster

QUIESCE_SECONDS = 20.0
"""A member that can't reap its killed workers for so long has a process stuck in the kernel: its pod is condemned."""
LAST_CALL_SECONDS = 1.0
"""How long a member that was missing while steps went on has to answer an invitation once they have stopped."""
RESEND_SECONDS = 2.0
REMEMBERED_FAULTS = 8

Loss = tuple[str, str]
"""Cause and witness."""


@dataclass(slots=True)
class Verdicts:
    """Mutable state of the leader. ``history`` goes with it from epoch to epoch."""

    ladder: Ladder
    history: list[Fault] = field(default_factory=list)
    used: policy.Used = policy.Used()  # noqa: RUF009  (frozen)
    condemned: dict[int, Loss] = field(default_factory=dict)
    """Slots whose pods are given up: only another membership helps."""
    suspects: list[Fault] = field(default_factory=list)
    """What ended the generation before, as far as it was told, and is not judged yet: the likeliest root of all that
    was accused, alone. With all ranks' accounts, each with the end of its log, thousands would be gone through. It has
    all that was told of its output; the history has what of it was found, and the last lines."""
    lost: dict[int, Loss] = field(default_factory=dict)
    """Slots that the operator is asked to fill anew: the condemned, and members that may still come back."""
    _asked_at: float = 0.0

    @property
    def fatal(self) -> bool:
        """It is the user's error: nothing need be waited for."""
        return any(fault.user_error or fault.exit_code == policy.USER_ERROR_EXIT for fault in self.suspects)

    @property
    def gone(self) -> bool:
        """Slots wait for other pods."""
        return bool(self.lost or self.condemned)

    def accuse(self, fault: Fault) -> None:
        """One more account of what ended the generation."""
        self.suspects = [policy.root_cause([*self.suspects, fault])]

    def judge(self, *, intact: bool) -> tuple[Fault, Decision] | None:
        """The root of the last generation's end and what it leads to; None where its slot was condemned already: the
        operator is asked anyway, and keeps that record. ``intact``: all workers of the generation rest."""
        fault = policy.root_cause(self.suspects)
        self.suspects.clear()
        if fault.slot in self.condemned:
            return None
        fault = policy.searched(fault, self.ladder.rules)
        decision = policy.decide(fault, self.history, self.used, self.ladder, intact=intact)
        answer = decision.rung if isinstance(decision, policy.Restart) else "pod"
        self.history = [*self.history[1 - REMEMBERED_FAULTS :], replace(fault, answer=answer)]
        if isinstance(decision, policy.Restart):
            process = self.used.process + (decision.rung == "process")
            self.used = policy.Used(process, self.used.in_process + (decision.rung == "inProcess"))
        elif isinstance(decision, policy.Replace):
            self.condemned[decision.slot] = (fault.cause, fault.witness)
        return fault, decision

    def durable(self, step: int) -> None:
        """A checkpoint beyond all faults refills the budget."""
        if self.history and step > max(fault.step for fault in self.history):
            self.used = policy.Used()

    def missing(self, roster: Roster, formed_at: float, grace: float, now: float) -> dict[int, Loss]:
        """Who is to be asked for now: members that do not come back within ``grace`` seconds, or can't end their
        workers. Empty where there is nobody, or the operator was asked a moment ago.

        While others still arrive, the grace counts from the last arrival: with thousands of members, or on a machine
        that is overloaded, handshakes alone take longer than it, and who waits its turn is not lost. Only first
        arrivals count, so that a member that comes and goes holds up nobody."""
        lost: dict[int, Loss] = dict(self.condemned)
        arrival = roster.newest_arrival
        for slot, peer in roster.members.items():
            if not peer.connected:
                silent = arrival is not None and now - max(peer.missing_since, arrival) > grace
                if silent and now - formed_at > LAST_CALL_SECONDS:
                    lost.setdefault(slot, ("MemberLost", "stream"))
            elif not peer.quiet and now - max(formed_at, peer.came_at or formed_at) > QUIESCE_SECONDS:
                lost.setdefault(slot, ("CannotQuiesce", "stream"))
        changed = lost.keys() != self.lost.keys()
        self.lost = lost
        if not lost or (not changed and now - self._asked_at < RESEND_SECONDS):
            return {}
        self._asked_at = now
        return lost

    @classmethod
    def resumed(
        cls, ladder: Ladder, history: Iterable[Fault], used: policy.Used, suspects: Iterable[Fault] = ()
    ) -> Verdicts:
        """With what an earlier leader remembered."""
        return cls(ladder, list(history), used, suspects=list(suspects))
