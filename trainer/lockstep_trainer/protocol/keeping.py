"""The leader's care for states: which one is kept in memory, brought to the store, committed, started from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lockstep_api.messages import (
    Committed,
    Cut,
    Kept,
    Leaving,
    RestorePoint,
    Staged,
    Start,
    StateId,
    TakeSnapshot,
    Term,
    Upload,
    Uploaded,
    UploadProblem,
    Void,
)
from lockstep_trainer.protocol.cadence import Cadence, cadence
from lockstep_trainer.protocol.effects import Effect, Persist
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.lineage import (
    Lineage,
    begun_from,
    buddies,
    excluded,
    newer_cut,
    order_of,
)
from lockstep_trainer.protocol.policy import CORRUPTION, PEER_LOST_EXIT, SUSPECTED, Fault
from lockstep_trainer.protocol.roster import Peer
from lockstep_trainer.protocol.snapshots import Snapshots
from lockstep_trainer.protocol.uploads import Uploads

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader

RESEND_SECONDS = 2.0
BUDDY_SECONDS = 5.0
"""A buddy without a stream for so long is not waited for."""
TRIES = 3
"""A snapshot that so many generations in a row could not start from is not tried again; one is enough where the workers
themselves gave up."""


@dataclass(frozen=True, slots=True)
class KeepingMemory:
    """What must be remembered over the death of the leader's agent."""

    since: float
    """Since when faults were counted, Unix seconds."""
    blocked: float = 0.0
    seconds: float = 0.0
    tries: tuple[tuple[StateId, int], ...] = ()
    lineage: Lineage = Lineage()  # noqa: RUF009  (frozen)
    kept: StateId | None = None
    order: Upload | None = None
    ordered_at: float = 0.0
    asked: int | None = None
    agreed: int | None = None
    cut: Cut | None = None


class Keeping:
    """Mutable state of the leader; ``same``: ``memory`` is of this epoch."""

    def __init__(self, plan: JobPlan, memory: KeepingMemory | None, same: bool, now: float) -> None:
        self.plan = plan
        self.snapshots = Snapshots(plan.nodes)
        self.uploads = Uploads(plan.checkpoint_every, plan.steps)
        self.lineage = Lineage()
        self.since = memory.since if memory else now
        self.tries: dict[StateId, int] = dict(memory.tries) if memory else {}
        self.agreed = memory.agreed if memory else None
        """The last step on the lineage whose replay agreed, None where none is known of: see ``rollback``."""
        self.cut = memory.cut if memory else None
        self.restore_problem: str | None = None
        """What the workers met when they restored, until they make steps."""
        self._said_at = now
        self._stuck = ""
        self._fell_back = False
        self._hold = False
        if memory:
            self.snapshots.blocked, self.uploads.seconds = memory.blocked, memory.seconds
        if memory and same:
            self.lineage, self.snapshots.kept = memory.lineage, memory.kept
            self.uploads.order, self.uploads.ordered_at = memory.order, memory.ordered_at
            self.uploads.asked = memory.asked

    def memory(self) -> KeepingMemory:
        """What Persist writes."""
        return KeepingMemory(
            since=self.since,
            blocked=self.snapshots.blocked,
            seconds=self.uploads.seconds,
            tries=tuple(self.tries.items()),
            lineage=self.lineage,
            kept=self.snapshots.kept,
            order=None if self.uploads.shares else self.uploads.order,
            ordered_at=self.uploads.ordered_at,
            asked=self.uploads.asked,
            agreed=self.agreed,
            cut=self.cut,
        )

    # -------------------------------------------------------------------------------- what members say

    def staged(self, leader: Leader, peer: Peer, message: Staged, now: float) -> list[Effect]:
        """A slot has a state in memory."""
        if not self.plan.checkpoints or not self.lineage.holds(message.state):
            return []
        kept = self.snapshots.kept
        if kept is not None and order_of(message.state) <= order_of(kept):
            return leader.roster.say(peer, Kept(self.plan.job_uid, leader.term, kept), now)
        voids: list[Effect] = []
        for slot in sorted(self.snapshots.add(message, now)):  # who waits for what will never come
            void = Void(self.plan.job_uid, leader.term, self.snapshots.at[slot].state)
            voids += leader.roster.say(leader.roster.members[slot], void, now)
        return self.go_on(leader, now) + voids

    def uploaded(self, leader: Leader, peer: Peer, message: Uploaded, now: float) -> list[Effect]:
        """A slot's files are in the store."""
        durable = leader.durability.durable
        if durable and leader.durability.committed(message.state):
            return leader.roster.say(peer, Committed(self.plan.job_uid, leader.term, durable), now)
        pending = self.uploads.uploaded(message, self.plan.nodes, now)
        return leader.durability.ready(pending, leader.term, now) if pending else []

    def failed(self, leader: Leader, message: UploadProblem, now: float) -> list[Effect]:
        """A slot's files do not get there."""
        self.uploads.failed(message)
        leader.reports.dirty = True
        order, said = self.uploads.order, self.uploads.problems.get(message.slot)
        if order and said and order.again:  # where a file of that name is there, of another size, it will never be
            return self.missed(leader, order.state, now)
        if self.uploads.shares and order and said and said.gone:
            self.tries[order.state] = TRIES  # the next older one, then
            self.uploads.drop()
        return self.go_on(leader, now)

    def missed(self, leader: Leader, state: StateId, now: float) -> list[Effect]:
        """Files of it are not in the store although all slots have brought theirs: once more. Where that is in vain the
        next newer state is brought there in its place, and behind the last step that is made again."""
        alone = bool(self.uploads.shares) or (self.plan.steps is not None and state.step >= self.plan.steps)
        if self.uploads.miss(state) and alone:
            self.tries[state] = TRIES
        return [Persist(), *self.go_on(leader, now)]

    def leaving(self, leader: Leader, message: Leaving, now: float) -> list[Effect]:
        """A pod is about to end: a last state before it does."""
        if leader.running is None or not self.answered(leader):
            return []
        return [*leader.reports.leaving(leader, message, now), *self.take(leader, now)]

    # -------------------------------------------------------------------------------------- decisions

    def go_on(self, leader: Leader, now: float) -> list[Effect]:
        """Keep what can be kept, order what is due."""
        effects: list[Effect] = []
        state = self.snapshots.next(lambda: self._excused(leader, now))
        if state is not None:
            leader.reports.dirty = True
            told = leader.roster.say_all(Kept(self.plan.job_uid, leader.term, state), now)
            effects += [Persist(), *leader.reports.kept(leader, state, self.snapshots.alone, now), *told]
        durability = leader.durability
        if not durability.known or durability.pending or durability.superseded:
            return effects
        kept, durable = self.snapshots.kept, durability.durable
        if kept is None:
            return effects
        interval = self.cadence(leader, now).interval if self.plan.checkpoint_every is None else 0.0
        if not self.uploads.wants(kept, durable, interval, now):
            return effects
        order = Upload(self.plan.job_uid, leader.term, kept, durable)
        self.uploads.give(order, now)
        return [*effects, Persist(), *leader.roster.say_all(order, now)]

    def take(self, leader: Leader, now: float, *, hold: bool = False) -> list[Effect]:
        """Ask all workers for a snapshot that goes to the store at once; ``hold``: and for no step behind it."""
        last = max(leader.newest_step, leader.steps.heard)
        self.uploads.asked = last if self.plan.steps is None else min(last, self.plan.steps - 1)
        self._said_at = now
        self._hold = hold
        asked = leader.roster.say_all(TakeSnapshot(self.plan.job_uid, leader.term, hold), now)
        return [Persist(), *asked, *self.go_on(leader, now)]

    def answered(self, leader: Leader) -> bool:
        """The state that was asked for is durable."""
        durable, asked = leader.durability.durable, self.uploads.asked
        return asked is None or (durable is not None and durable.state.step > asked)

    def assured(self, leader: Leader) -> bool:
        """The state that was asked for is durable, or all keep it and are told to bring it to the store, for which they
        need no workers: further steps would be lost."""
        asked, order = self.uploads.asked, self.uploads.order
        on_its_way = asked is not None and order is not None and order.state.step > asked
        return on_its_way or self.answered(leader)

    def in_flight(self, leader: Leader) -> bool:
        """A state is on its way to the chain."""
        return self.uploads.order is not None or leader.durability.pending

    def last_is_gone(self) -> bool:
        """All workers have ended well, and the last state will not be durable: a slot has it no more, which was to
        upload it, or to keep it; or the store has it no more."""
        last = self.plan.steps or 0
        if self.uploads.lost is not None and self.uploads.lost.step >= last:
            return True
        lost = any(said.gone and said.state.step >= last for said in self.snapshots.at.values())
        return (lost and self.last_is_nowhere()) or any(said.gone for said in self.uploads.problems.values())

    def last_is_nowhere(self) -> bool:
        """All workers have ended well, and no slot can say that it has the last state."""
        last, kept, order = self.plan.steps or 0, self.snapshots.kept, self.uploads.order
        return not (kept and kept.step >= last) and not (order and order.state.step >= last)

    def cadence(self, leader: Leader, now: float) -> Cadence:
        """How often a state is to be durable, by what was measured."""
        return cadence(
            blocked=self.snapshots.blocked,
            upload=self.uploads.seconds,
            faults=sum(leader.reports.fault_counts().values()),
            observed=now - self.since,
            gpus=self.plan.nodes * self.plan.gpus_per_node,
        )

    def problem(self, leader: Leader) -> str | None:
        """Why states do not get where they should, for people."""
        of_store = leader.durability.problem or self.uploads.problem
        return of_store or self.restore_problem or self.snapshots.alone or self._stuck or None

    def repeat(self, leader: Leader, now: float) -> list[Effect]:
        """On each tick: what time alone makes due, and orders that may not have arrived."""
        effects = self.go_on(leader, now)
        self._stuck = self.snapshots.stuck(now)
        if now - self._said_at < RESEND_SECONDS:
            return effects
        self._said_at = now
        uploads = self.uploads
        if uploads.order:
            uploads.order = replace(uploads.order, term=leader.term)
            for slot, peer in leader.roster.members.items():
                if order := uploads.order_for(slot):
                    effects += leader.roster.say(peer, order, now)
        kept = self.snapshots.kept
        if leader.running and uploads.asked is not None and (kept is None or kept.step <= uploads.asked):
            effects += leader.roster.say_all(TakeSnapshot(self.plan.job_uid, leader.term, self._hold), now)
        return effects

    # ------------------------------------------------------------------------------------ generations

    def refused(self) -> list[StateId]:
        """States in memory that are not tried again."""
        return [state for state, count in self.tries.items() if count >= TRIES]

    def buddies(self, leader: Leader) -> tuple[str, ...]:
        """Who keeps whose copies in the next generation."""
        wanted = self.plan.checkpoints and self.plan.memory_buddy
        return buddies(leader.membership.slots) if wanted else ()

    def started(self, leader: Leader, start: Start) -> None:
        """A generation starts: what it does not descend from is forgotten."""
        self._fell_back = self._hold = False
        self.restore_problem = None
        self.uploads.asked = self.uploads.lost = None
        self._descend(leader, begun_from(start))

    def ended(self, leader: Leader, fault: Fault) -> None:
        """A generation has failed. One that began from a snapshot and made no step may have failed by it."""
        last = self._unproven(leader)
        if last is None or fault.cause in (CORRUPTION, SUSPECTED):  # what was computed from it was wrong, not the state
            return
        own = fault.cause == "Hang" or (fault.exit_code or 0) > 0
        gave_up = own and fault.exit_code != PEER_LOST_EXIT
        self.tries[last] = TRIES if gave_up else self.tries.get(last, 0) + 1

    def chosen(self, leader: Leader, now: float) -> list[Effect]:
        """The chain has answered. What it names needs no upload any more."""
        durability, order = leader.durability, self.uploads.order
        if order is None or durability.pending:
            return []
        durable = durability.durable
        if durable and durability.committed(order.state):
            self.uploads.drop()
            return leader.roster.say_all(Committed(self.plan.job_uid, leader.term, durable), now)
        if order.parent != durable:
            self.uploads.drop()
        return []

    def fell_back(self, leader: Leader, point: RestorePoint | None, now: float) -> list[Effect]:
        """The workers began from an older state than they were told to, since copies or files of that one are corrupt:
        what lies between is on no lineage. Where the chain has moved on since their Start, or may have, they descend
        from nothing that it names by now, and begin again."""
        start = leader.running
        if start is None or self._fell_back:
            return []
        self._fell_back = True
        if start.memory:
            self.tries[start.memory.state] = TRIES
        durability = leader.durability
        if durability.durable != start.restore or durability.doubtful or not durability.known:
            return self.stale(leader, now)
        durability.found(point, now)
        self._descend(leader, point.state if point else None)
        return [Persist()]

    def stale(self, leader: Leader, now: float) -> list[Effect]:
        """What its workers make could never be committed: the generation begins again."""
        self._keep_to(self.lineage.without(leader.term))  # until they have left they go on with steps and snapshots
        return leader.fault(leader.suspect("StaleRestore", "restore", now), now)

    def restored(self, leader: Leader, line: dict[str, Any], now: float) -> list[Effect]:
        """Rank 0's line about its restore: ``source`` "memory" or "store"; of a checkpoint, ``manifest``, ``sha256``,
        ``state`` [step, epoch, generation]."""
        start, manifest = leader.running, line.get("manifest")
        if start is None or line.get("source") == "memory":
            return self._agreed_before(leader, line)
        if manifest == (start.restore.manifest if start.restore else None):
            effects = self.fell_back(leader, start.restore, now) if start.memory else []
        elif manifest and line.get("sha256") and line.get("state"):
            effects = self.fell_back(leader, RestorePoint(StateId(*line["state"]), manifest, line["sha256"]), now)
        else:
            return []
        return [*effects, *self._agreed_before(leader, line)]

    def replayed(self, leader: Leader, step: int) -> list[Effect]:
        """The replay of that step agreed: so it is with what the running generation descends from."""
        if leader.running is None or (self.agreed is not None and step <= self.agreed):
            return []
        self.agreed = leader.durability.agreed = step
        return [Persist()]

    def _agreed_before(self, leader: Leader, line: dict[str, Any]) -> list[Effect]:
        """What the state that was restored says of itself: a new leader has not heard those replays."""
        agreed, step = line.get("agreed"), line.get("step")
        if not isinstance(agreed, int) or not isinstance(step, int):
            return []
        leader.reports.replays = leader.reports.replays.outlived(min(agreed, step))
        return self.replayed(leader, min(agreed, step))

    def cuts(self, term: Term) -> bool:
        """That generation was ended by a cut."""
        return self.cut is not None and self.cut.term == term

    def exclude(self, leader: Leader, cut: Cut | None) -> bool:
        """From now on nothing starts from what ``cut`` excludes; false: that was known."""
        if cut is None or newer_cut(self.cut, cut) == self.cut:
            return False
        self.cut = cut
        leader.reports.replays = leader.reports.replays.told(cut.dispute)
        self.agreed = leader.durability.agreed = None if self.agreed is None else min(self.agreed, cut.step)
        self.lineage = self.lineage.up_to(cut.step)
        kept, order = self.snapshots.kept, self.uploads.order
        self.snapshots.begin(kept if kept and not excluded(kept, cut) else None)
        if order and excluded(order.state, cut):
            self.uploads.drop()
        leader.durability.exclude(cut)
        return True

    def stepped(self, leader: Leader, first: int, now: float) -> list[Effect]:
        """A member's first reported step shows where its workers began."""
        start = leader.running
        if start is None or start.memory is None or first > start.memory.state.step:
            return []
        return self.fell_back(leader, start.restore, now)

    def _descend(self, leader: Leader, begun: StateId | None) -> None:
        self._keep_to(self.lineage.grown(leader.term, begun))
        if self.agreed is not None:  # later steps were of states that are left behind
            self.agreed = leader.durability.agreed = min(self.agreed, begun.step if begun else 0)
        self.snapshots.begin(None)
        leader.durability.begin(self.lineage)

    def _keep_to(self, lineage: Lineage) -> None:
        """What is not on it is not brought to the store any more."""
        self.lineage = lineage
        if self.uploads.order and not lineage.holds(self.uploads.order.state):
            self.uploads.drop()

    def _unproven(self, leader: Leader) -> StateId | None:
        """The snapshot that the last generation was to begin from, if it made no step."""
        start = leader.last_start
        if start is None or start.memory is None or leader.reports.step_of(start.term) > 0:
            return None
        return start.memory.state

    def _excused(self, leader: Leader, now: float) -> dict[int, str]:
        start = leader.last_start
        if start is None or not start.buddies:
            return {}
        excused: dict[int, str] = {}
        for peer in leader.roster.missing:
            if now - peer.missing_since < BUDDY_SECONDS:
                continue
            for slot, address in enumerate(start.buddies):
                if address == peer.info.address:
                    excused[slot] = f"slot {peer.info.slot}, which keeps copies of slot {slot}, is away"
        return excused
