"""An agent as member or spare: follows one leader, runs the workers it is told to run.

Three rules carry it. It compares every message by (job uid, epoch, generation) and drops what is older. It starts a
generation once, and only while none of its workers is at work. It says Quiesced only when all its workers are reaped or
idle: out of their generation, and waiting for the next Start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lockstep_api.messages import (
    Abandon,
    Beat,
    Committed,
    Examine,
    Examined,
    Injected,
    Injection,
    Inventory,
    Invite,
    Join,
    Kept,
    Quiesced,
    Release,
    Start,
    Steps,
    TakeSnapshot,
    Term,
    Upload,
    Void,
    WorkerExited,
)
from lockstep_trainer.protocol.effects import (
    CloseStream,
    Effect,
    ExamineWorkers,
    Kill,
    Launch,
    Leave,
    OpenStream,
    Persist,
    RequestSnapshot,
    SendLeader,
)
from lockstep_trainer.protocol.events import (
    FaultOrdered,
    Invited,
    LeaderSaid,
    MemberEvent,
    PodEnding,
    SnapshotsHeld,
    StateCopied,
    StateStaged,
    StateUploaded,
    StreamClosed,
    StreamOpened,
    Tick,
    UploadFailed,
    Warmed,
    WorkerEnded,
    WorkerIdle,
    WorkersExamined,
    WorkersStepped,
)
from lockstep_trainer.protocol.holdings import Holdings, HoldingsMemory
from lockstep_trainer.protocol.nodeworkers import NodeWorkers

BEAT_SECONDS = 1.0
"""Something is said at least so often on an open stream."""
SILENCE_SECONDS = 3.0
"""A stream without a word for so long counts as closed: three beats lost. While steps go on that costs nothing."""
RESEND_SECONDS = 2.0
"""What was not acknowledged is said again after so long."""
RETAINED_INJECTIONS = 8
"""Faults made on purpose that a new leader hears of."""

NO_TERM = Term(0, 0)


@dataclass(frozen=True, slots=True)
class Identity:
    """What this pod is for as long as the agent lives."""

    job_uid: str
    pod: str
    pod_uid: str
    boot_id: str
    container_starts: int = 1
    agent_starts: int = 1
    devices: tuple[str, ...] = ()  # its GPUs in order, by serial number and UUID


@dataclass(frozen=True, slots=True)
class MemberMemory:
    """What a member must remember over its agent's death."""

    epoch: int = 0
    slot: int | None = None
    spare: bool = False
    leader: str | None = None
    term: Term = NO_TERM
    """Highest ever seen."""
    running: Start | None = None
    working_slot: int | None = None
    """The slot whose ranks ``running`` is: an epoch of fewer nodes gives survivors others."""
    step: int = 0
    container_starts: int = 1
    holdings: HoldingsMemory = HoldingsMemory()  # noqa: RUF009  (frozen)


class Member:
    """The member's state; ``handle`` is its only entry."""

    def __init__(self, me: Identity, memory: MemberMemory, *, leaderless_seconds: float, now: float) -> None:
        """With ``memory.running``, the shell tells with WorkerEnded which of its workers did not survive."""
        self.me = me
        self.epoch = memory.epoch
        self.slot = memory.slot
        self.spare = memory.spare
        self.leader = memory.leader
        self.term = memory.term
        # A container that was started again has none of its processes left.
        running = memory.running if memory.container_starts == me.container_starts else None
        slot = memory.slot if memory.working_slot is None else memory.working_slot
        self.workers = NodeWorkers(running, slot, memory.step, now)
        self.warm = False
        self.connected = False
        self.last_heard: float | None = now if memory.leader else None
        self._leaderless_seconds = leaderless_seconds
        self._injected: deque[Injection] = deque(maxlen=RETAINED_INJECTIONS)
        self.holdings = Holdings(memory.holdings)
        self._said_at = now
        self._holdings_said_at = now
        self._persisted_step = memory.step
        self._opened_at = now
        self._handlers: dict[type, Callable[[Any, float], list[Effect]]] = {
            Tick: lambda _, now: self._tick(now),
            Invited: lambda event, now: self._invited(event.invite, now),
            StreamOpened: lambda event, now: self._stream_opened(event.epoch, now),
            StreamClosed: lambda event, _: self._stream_closed(event.epoch),
            LeaderSaid: self._leader_said,
            WorkerEnded: self._worker_ended,
            WorkerIdle: self._worker_idle,
            WorkersStepped: self._workers_stepped,
            WorkersExamined: self._workers_examined,
            FaultOrdered: self._fault_ordered,
            StateStaged: lambda event, now: self._say(self.holdings.staged(event), now),
            StateCopied: lambda event, now: self._say(self.holdings.copied(event), now),
            StateUploaded: lambda event, now: self._say(self.holdings.uploaded(event), now),
            UploadFailed: lambda event, now: [*self.holdings.failed(event), *self._say_holdings(now)],
            SnapshotsHeld: self._snapshots_held,
            Warmed: self._warmed,
            PodEnding: lambda event, now: [*self.holdings.ending(event, now), *self._say_holdings(now)],
        }

    def handle(self, event: MemberEvent, now: float) -> list[Effect]:
        """What is to be done about ``event``."""
        return self._handlers[type(event)](event, now)

    def memory(self) -> MemberMemory:
        """What Persist writes."""
        return MemberMemory(
            epoch=self.epoch,
            slot=self.slot,
            spare=self.spare,
            leader=self.leader,
            term=self.term,
            running=self.workers.running,
            working_slot=self.workers.slot,
            step=self.workers.step,
            container_starts=self.me.container_starts,
            holdings=self.holdings.memory,
        )

    def resume(self) -> list[Effect]:
        """After the agent's own restart: find the leader again."""
        effects = self.holdings.resume(self.workers.running)
        return [*effects, OpenStream(self.leader, self.epoch)] if self.leader else effects

    def inventory(self, now: float, leading: int | None) -> Inventory:
        """Who this agent is and what it last heard."""
        return Inventory(
            job_uid=self.me.job_uid,
            pod=self.me.pod,
            pod_uid=self.me.pod_uid,
            boot_id=self.me.boot_id,
            term=self.term,
            leading=leading,
            slot=None if self.spare else self.slot,
            running=self.workers.running.term if self.workers.running else None,
            step=self.workers.step,
            leader_silent=None if self.last_heard is None else max(0.0, now - self.last_heard),
            container_starts=self.me.container_starts,
            agent_starts=self.me.agent_starts,
            origin=self.holdings.memory.origin,
            snapshots=self.holdings.copies,
            warm=self.warm,
            devices=self.me.devices,
        )

    def accepts(self, invite: Invite) -> bool:
        """True where the invite is for this pod in this boot, and not of an older epoch or of another leader."""
        mine = (invite.job_uid, invite.pod_uid, invite.boot_id) == (self.me.job_uid, self.me.pod_uid, self.me.boot_id)
        return mine and (
            invite.epoch > self.epoch or (invite.epoch == self.epoch and self.leader in (None, invite.leader))
        )

    # -------------------------------------------------------------------------------------- stream

    def _invited(self, invite: Invite, now: float) -> list[Effect]:
        if not self.accepts(invite):
            return []
        if invite.epoch == self.epoch and self.leader and (now - self._opened_at < 1.0 or self._hears(now)):
            return []  # already on its way there, or there
        changed = invite.epoch != self.epoch or self.leader is None
        self.epoch, self.slot, self.spare, self.leader = invite.epoch, invite.slot, invite.spare, invite.leader
        self.connected = False
        self._opened_at = now
        self.last_heard = now
        effects: list[Effect] = [*([Persist()] if changed else []), OpenStream(invite.leader, invite.epoch)]
        workers = self.workers
        if self.spare and workers.running:  # a member of an epoch of more nodes: nobody else will end its workers
            effects += self._abandon(workers.running.term, now)
        elif self.spare and workers.resting:
            workers.resting.clear()
            effects.append(Kill(self.term))
        return effects

    def _hears(self, now: float) -> bool:
        return self.connected and self.last_heard is not None and now - self.last_heard < BEAT_SECONDS * 1.5

    def _stream_opened(self, epoch: int, now: float) -> list[Effect]:
        """Join, then all that the leader may have missed."""
        if epoch != self.epoch or self.slot is None:
            return []
        self.connected = True
        self.last_heard = self._said_at = now
        known = self.holdings.memory
        join = Join(self.me.job_uid, self.epoch, self.slot, self.inventory(now, None), known.cut, known.descent)
        effects: list[Effect] = [SendLeader(join)]
        workers = self.workers
        if workers.made_in and (workers.running or workers.recent):
            steps = Steps(self.me.job_uid, workers.made_in, self.slot, workers.recent, workers.section)
            effects.append(SendLeader(steps))
        if workers.running:
            effects += [SendLeader(ended) for ended in workers.exits]
            effects += self._say_injected()
        return [*effects, *self._say_holdings(now)]

    def _stream_closed(self, epoch: int) -> list[Effect]:
        if epoch == self.epoch:
            self.connected = False
        return []

    def _leader_said(self, event: LeaderSaid, now: float) -> list[Effect]:
        message = event.message
        if event.epoch != self.epoch or message.job_uid != self.me.job_uid or self.slot is None:
            return []
        self.last_heard = now
        match message:
            case Start():
                return self._start(message, now)
            case Abandon():
                return [*self.holdings.heard_cut(message.cut), *self._abandon(message.term, now)]
            case Committed():
                return self.holdings.committed(message.restore)
            case Kept() if message.term == self.term:
                return self._say(self.holdings.kept_by_all(message), now)
            case Void() if message.term == self.term:
                return self._say(self.holdings.void(message.state), now)
            case Upload() if message.term == self.term:
                return self.holdings.ordered(message)
            case TakeSnapshot() if self.workers.running and message.term == self.term:
                return [RequestSnapshot(message.term, message.hold)]
            case Examine() if self.workers.running and message.term == self.term:
                return [ExamineWorkers(message.term)]
            case Release():
                self.leader = None
                self.workers.resting.clear()
                return [Kill(message.term), *self._abandon(message.term, now), CloseStream(), Persist()]
            case _:
                return []

    # ------------------------------------------------------------------------------------- workers

    def _start(self, start: Start, now: float) -> list[Effect]:
        assert self.slot is not None
        if self.spare or start.term.epoch != self.epoch:
            return []
        if start.term <= self.term or self.workers.running:
            return [self._beat(now)]  # a repeated order; where it is a newer one, Abandon comes first
        self.term = start.term
        moved = self.workers.slot not in (None, self.slot)
        self.workers.start(start, self.slot, now)
        snapshots = self.holdings.started(start, self.slot, moved=moved)
        first = [Persist(), *snapshots, Launch(start, self.slot), self._beat(now)]
        return [*first, *self._say(self.holdings.held(self.holdings.copies, self.slot), now)]

    def _abandon(self, term: Term, now: float) -> list[Effect]:
        """End all workers up to ``term``. Remembered first: a Start that was overtaken must not be obeyed later."""
        raised = term > self.term
        self.term = max(self.term, term)
        effects: list[Effect] = [Persist()] if raised else []
        workers = self.workers
        if workers.running and workers.running.term > term:
            return [self._beat(now)]  # an old order
        workers.abandon(term, now)
        if workers.live:
            return [*effects, self._end_of(term)]
        return [*effects, *self._quiesced(now)]

    def _end_of(self, term: Term) -> Effect:
        """Workers go on with the next generation in the same process, where there is anybody to start one."""
        return Leave(term) if self.leader and not self.spare else Kill(term)

    def _quiesced(self, now: float) -> list[Effect]:
        term = self.workers.quiesced()
        return [Persist(), *(self._say_quiesced(term, now) if term else [])]

    def _say_quiesced(self, term: Term, now: float) -> list[Effect]:
        if self.slot is None:
            return []
        self._said_at = now
        origin, copies = self.holdings.memory.origin, self.holdings.copies
        return [SendLeader(Quiesced(self.me.job_uid, term, self.slot, origin, copies, len(self.workers.resting)))]

    def _worker_ended(self, event: WorkerEnded, now: float) -> list[Effect]:
        workers = self.workers
        if event.term == self.term:
            workers.resting.discard(event.rank)
        if not workers.at_work(event.term, event.rank) or self.slot is None:
            return []
        return self._no_longer_at_work(workers.ended(event, self.me.job_uid, self.slot), now)

    def _worker_idle(self, event: WorkerIdle, now: float) -> list[Effect]:
        if not self.workers.at_work(event.term, event.rank) or self.slot is None:
            return []
        return self._no_longer_at_work(self.workers.idle(event, self.me.job_uid, self.slot), now)

    def _no_longer_at_work(self, said: WorkerExited | None, now: float) -> list[Effect]:
        effects: list[Effect] = [SendLeader(said)] if said else []
        if self.workers.abandoning is None:
            self._said_at = now
            return effects
        return effects if self.workers.live else [*effects, *self._quiesced(now)]

    def _workers_stepped(self, event: WorkersStepped, now: float) -> list[Effect]:
        running = self.workers.running
        if not running or event.term != running.term or self.slot is None:
            return []
        effects = self.holdings.fell_back(event.done[0].step) if event.done else []
        self.workers.stepped(event.done, event.section, now)
        self._said_at = now
        steps = Steps(self.me.job_uid, event.term, self.slot, event.done, event.section, event.work)
        return [*effects, SendLeader(steps)]

    def _workers_examined(self, event: WorkersExamined, now: float) -> list[Effect]:
        running = self.workers.running
        if not running or event.term != running.term or self.slot is None:
            return []
        self._said_at = now
        return [SendLeader(Examined(self.me.job_uid, event.term, self.slot, event.positions))]

    def _fault_ordered(self, event: FaultOrdered, now: float) -> list[Effect]:
        self._injected.append(event.injection)
        self._said_at = now
        return self._say_injected()

    def _say_injected(self) -> list[Effect]:
        running = self.workers.running
        if not self._injected or not running or self.slot is None:
            return []
        return [SendLeader(Injected(self.me.job_uid, running.term, self.slot, tuple(self._injected)))]

    def _warmed(self, event: Warmed, _: float) -> list[Effect]:
        self.warm = event.warm
        return []

    # ----------------------------------------------------------------------------------- snapshots

    def _snapshots_held(self, event: SnapshotsHeld, now: float) -> list[Effect]:
        changed = event.copies != self.holdings.copies
        effects = self._say(self.holdings.held(event.copies, self.slot), now)
        if changed and self.workers.running is None and self.connected:  # the next restore is chosen by it
            effects += self._say_quiesced(self.term, now)
        return effects

    def _say(self, effects: list[Effect], now: float) -> list[Effect]:
        """Where something has changed, the leader hears of it at once."""
        return [*effects, *self._say_holdings(now)] if effects else []

    def _say_holdings(self, now: float) -> list[Effect]:
        if self.slot is None or self.spare:
            return []
        said = self.holdings.says(self.me.job_uid, self.term, self.slot, now)
        self._holdings_said_at = now
        if said:
            self._said_at = now
        return [SendLeader(message) for message in said]

    # ---------------------------------------------------------------------------------------- time

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        workers = self.workers
        silent = self.last_heard is not None and now - self.last_heard > SILENCE_SECONDS
        if self.connected and silent and self.leader:
            self.connected = False
            self._opened_at = now
            effects.append(OpenStream(self.leader, self.epoch))
        if self.connected and now - self._said_at >= BEAT_SECONDS:
            effects.append(self._beat(now))
        if self.connected and now - self._holdings_said_at >= RESEND_SECONDS:
            effects += self._say_holdings(now)
        if workers.step != self._persisted_step:
            self._persisted_step = workers.step
            effects.append(Persist())
        if workers.live and workers.abandoning is not None:
            effects.append(self._end_of(workers.abandoning))
        elif workers.running and not self.connected and self._leaderless(now):
            effects += self._abandon(workers.running.term, now)
        return effects

    def _leaderless(self, now: float) -> bool:
        """No leader and no step for so long: the others are gone, and whoever comes back starts anew."""
        since = max(self.last_heard or 0.0, self.workers.advanced_at)
        return now - since > self._leaderless_seconds

    def _beat(self, now: float) -> SendLeader:
        assert self.slot is not None
        self._said_at = now
        return SendLeader(Beat(self.me.job_uid, self.term, self.slot))
