"""What every pod's agent runs: a member, and the leader too where it holds slot 0."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_api.messages import EpochRequest, Inventory, Membership
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Effect, SendOperator
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader, LeaderMemory
from lockstep_trainer.protocol.member import Identity, Member, MemberMemory


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """What the agent writes to its volume on each Persist."""

    member: MemberMemory
    leader: LeaderMemory | None = None


class Node:
    """The member and, for one epoch at a time, the leader."""

    def __init__(
        self, me: Identity, plan: JobPlan, memory: NodeMemory | None, *, leaderless_seconds: float, now: float
    ) -> None:
        self.me = me
        self.plan = plan
        fresh = MemberMemory(container_starts=me.container_starts)
        self.member = Member(me, memory.member if memory else fresh, leaderless_seconds=leaderless_seconds, now=now)
        self.leader: Leader | None = None
        self._last = memory.leader if memory else None
        self._operator = False

    def resume(self, now: float) -> list[Effect]:
        """First effects after the agent's start: go on with what an earlier agent of this boot did."""
        effects = self.member.resume()
        last = self._last
        if last and last.membership.epoch == self.member.epoch:
            self.leader = Leader(self.plan, last.membership, last, now)
            effects += self.leader.begin(now)
        return effects

    def handle(self, event: events.Event, now: float) -> list[Effect]:
        """What is to be done about ``event``."""
        kind = type(event)
        if kind is events.Tick:
            effects = self.member.handle(event, now)  # type: ignore[arg-type]
            return effects + self.leader.handle(event, now) if self.leader else effects  # type: ignore[arg-type]
        if kind in _MEMBER_EVENTS:
            if isinstance(event, events.Invited) and self.member.accepts(event.invite):
                self._retire(event.invite.epoch)
            return self.member.handle(event, now)  # type: ignore[arg-type]
        if isinstance(event, events.OperatorConnected):
            self._operator = True
        elif isinstance(event, events.OperatorClosed):
            self._operator = False
        elif isinstance(event, events.OperatorSaid) and isinstance(event.message, Membership):
            return self._membership(event.message, now)
        return self.leader.handle(event, now) if self.leader else []  # type: ignore[arg-type]

    def memory(self) -> NodeMemory:
        """What Persist writes."""
        return NodeMemory(self.member.memory(), self.leader.memory() if self.leader else self._last)

    def inventory(self, now: float) -> Inventory:
        """The answer to GET /v1/inventory, and the first frame to the operator."""
        return self.member.inventory(now, self.leader.epoch if self.leader and not self.leader.superseded else None)

    def _membership(self, membership: Membership, now: float) -> list[Effect]:
        """Lead this epoch, if it is a newer one and slot 0 is this pod in this boot."""
        if membership.job_uid != self.plan.job_uid:
            return []
        if membership.epoch < self.member.term.epoch or membership.epoch < self.member.epoch:
            return [SendOperator(self.inventory(now))]  # an older epoch than is known here
        first = membership.slots[0]
        if (first.pod_uid, first.boot_id) != (self.me.pod_uid, self.me.boot_id):
            cause = "slot 0 was given to this pod in an earlier boot: its generation count is lost"
            return [SendOperator(EpochRequest(membership.job_uid, membership.epoch, cause))]
        if self.leader and self.leader.epoch == membership.epoch:
            return []  # said twice
        if self.leader:
            self._last = self.leader.memory()
        self.leader = Leader(self.plan, membership, self._last, now)
        effects = self.leader.begin(now)
        if self._operator:
            effects += self.leader.handle(events.OperatorConnected(), now)
        return effects

    def _retire(self, epoch: int) -> None:
        """Another leads a newer epoch: whatever this one led is over."""
        if self.leader and self.leader.epoch < epoch:
            self._last = self.leader.memory()
            self.leader = None


_MEMBER_EVENTS = frozenset(
    {
        events.Invited,
        events.StreamOpened,
        events.StreamClosed,
        events.LeaderSaid,
        events.WorkerEnded,
        events.WorkerIdle,
        events.WorkersStepped,
        events.WorkersExamined,
        events.StateStaged,
        events.StateCopied,
        events.StateUploaded,
        events.UploadFailed,
        events.SnapshotsHeld,
        events.Warmed,
        events.PodEnding,
        events.FaultOrdered,
    }
)
