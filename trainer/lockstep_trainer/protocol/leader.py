"""The conductor of one epoch, in the agent of slot 0.

Between generations it waits until all members have a stream and are quiet, until the restore point and a rendezvous
store are known; then it writes the next generation's number to its volume and sends Start. While a generation runs it
watches; the first fault ends it: Abandon to all, and the circle begins anew. ``policy`` says when to go on with the
same members, when to ask the operator for others, and when to give up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lockstep_api.messages import (
    Abandon,
    Beat,
    Committed,
    EpochRequest,
    FaultAck,
    Finished,
    Join,
    Membership,
    Quiesced,
    Release,
    Rendezvous,
    ReplaceRequest,
    RestorePoint,
    Saved,
    Start,
    Steps,
    Stop,
    Term,
    WorkerExited,
)
from lockstep_trainer.protocol import events, policy
from lockstep_trainer.protocol.durability import Durability
from lockstep_trainer.protocol.effects import Effect, EnsureStore, Persist, SendOperator
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.ledger import Ledger
from lockstep_trainer.protocol.member import BEAT_SECONDS
from lockstep_trainer.protocol.policy import Fault
from lockstep_trainer.protocol.progress import UNBOUNDED_SECTIONS, Recovery, StepFold
from lockstep_trainer.protocol.reports import Reports
from lockstep_trainer.protocol.roster import Peer, Roster
from lockstep_trainer.protocol.verdicts import Verdicts

STALL_SECONDS = 2.0
"""A member without a stream, and no step for so long and two steps' time: enough for an agent to be started again."""
FINAL_SAVE_SECONDS = 60.0
"""How long the last checkpoint's listing may stay away once all workers have ended well."""


@dataclass(frozen=True, slots=True)
class LeaderMemory:
    """What the leader must remember over its agent's death, or takes into its next epoch."""

    membership: Membership
    generation: int = 0
    running: Start | None = None
    durable: RestorePoint | None = None
    faults: tuple[Fault, ...] = ()
    restarts_used: int = 0
    reports: Reports | None = None
    ledger: Ledger | None = None
    recovery: Recovery | None = None
    finished: Finished | None = None


class Leader:
    """The leader's state; ``handle`` is its only entry, after ``begin``."""

    def __init__(self, plan: JobPlan, membership: Membership, memory: LeaderMemory | None, now: float) -> None:
        """``memory`` of the same epoch goes on where it stood; of an older one it brings history."""
        same = memory is not None and memory.membership.epoch == membership.epoch
        self.plan = plan
        self.membership = membership
        self.epoch = membership.epoch
        self.generation = memory.generation if memory and same else 0
        self.roster = Roster(membership, now)
        self.running: Start | None = memory.running if memory and same else None
        self.finished: Finished | None = memory.finished if memory and same else None
        self.superseded = False
        self.durability = Durability(plan.checkpoints)
        if memory and same and self.running and plan.checkpoints:
            # This leader made every commit of the epoch; what it remembers may miss the last one, so the chain is
            # asked again before a restore, but not before the running generation goes on.
            self.durability.durable = memory.durable
        history, used = (memory.faults, memory.restarts_used if same else 0) if memory else ((), 0)
        self.verdicts = Verdicts.resumed(plan.ladder, history, used)
        self.recovery = memory.recovery if memory else None
        ledger = memory.ledger if memory and same else None
        highest = memory.ledger.highest if memory and memory.ledger else 0
        phase = "starting" if membership.epoch <= 1 and not history else "recovering"
        self.ledger = ledger or Ledger(plan.nodes * plan.gpus_per_node, now, highest, phase)  # type: ignore[arg-type]
        self.reports = (memory.reports if memory and memory.reports else None) or Reports()
        self.reports.new_leader(self, now)
        self._steps = StepFold(plan.nodes)
        self._store: tuple[str, int] | None = None
        self._store_asked = False
        self._stopping: str | None = None
        self.formed_at = now
        """When the present forming began."""
        self._started_at = now
        self._stepped_at = now
        self._done_at: float | None = None
        self._abandoned = Term(self.epoch, self.generation)
        self._handlers: dict[type, Callable[[Any, float], list[Effect]]] = {
            events.Tick: lambda _, now: self._tick(now),
            events.OperatorConnected: lambda _, now: self.reports.operator_connected(self, now),
            events.OperatorClosed: lambda _, __: self.reports.operator_closed(),
            events.OperatorSaid: self._operator_said,
            events.MemberConnected: self._member_connected,
            events.MemberClosed: self._member_closed,
            events.MemberSaid: self._member_said,
            events.InviteRefused: self._invite_refused,
            events.RestoreChosen: self._restore_chosen,
            events.RestoreUnavailable: self._restore_unavailable,
            events.StoreReady: self._store_ready,
            events.StoreLost: self._store_lost,
            events.CommitDone: self._commit_done,
            events.CommitFailed: self._commit_failed,
            events.WorkerReported: lambda event, now: self.reports.worker_reported(self, event.line, now),
        }

    # ------------------------------------------------------------------------------------- entries

    def begin(self, now: float) -> list[Effect]:
        """First effects: invitations, and all that can be prepared while members come."""
        effects: list[Effect] = [Persist(), *self.reports.membership(self, now), *self.roster.invite(now)]
        if self.running:  # it goes on; only the chain must be known again before the next commit
            return effects + self.durability.choose(self.term)
        return effects + self._advance(now)

    def handle(self, event: events.LeaderEvent, now: float) -> list[Effect]:
        """What is to be done about ``event``."""
        effects = self._handlers[type(event)](event, now)
        return effects if self.running else effects + self._advance(now)

    def memory(self) -> LeaderMemory:
        """What Persist writes."""
        return LeaderMemory(
            membership=self.membership,
            generation=self.generation,
            running=self.running,
            durable=self.durability.durable,
            faults=tuple(self.verdicts.history),
            restarts_used=self.verdicts.restarts_used,
            reports=self.reports,
            ledger=self.ledger,
            recovery=self.recovery,
            finished=self.finished,
        )

    @property
    def term(self) -> Term:
        """Epoch and newest generation."""
        return Term(self.epoch, self.generation)

    @property
    def newest_step(self) -> int:
        """Newest step of the running or last generation, its restore point included."""
        restored = self.running.restore if self.running else self.durability.durable
        return max(self.reports.step_of(self.term), restored.state.step if restored else 0)

    @property
    def finishing(self) -> bool:
        """All workers have ended well; only the last commit is missing."""
        return self._done_at is not None

    @property
    def steps_done(self) -> bool:
        """The running generation has done the last step; what follows is evaluation, generation and the last save."""
        return self.plan.steps is not None and self.newest_step >= self.plan.steps

    @property
    def section(self) -> str:
        """Where the workers are, as slot 0 says it: its first rank is the one that writes, evaluates and commits."""
        return "checkpoint" if self.finishing else self.roster.members[0].section

    # ------------------------------------------------------------------------------------- members

    def _member_connected(self, event: events.MemberConnected, now: float) -> list[Effect]:
        peer, effects = self.roster.join(event.connection, event.join, now)
        inventory = event.join.inventory
        if peer is None or inventory.slot is None or self.finished or self.superseded:
            return effects  # a stranger was sent away; a spare is only listened to
        if self.running is None:  # steps of a generation that goes on are still to be reported, and are no repetition
            self.ledger.highest = max(self.ledger.highest, inventory.step)
        if inventory.term > self.term:
            return effects + self._ask_for_epoch("a member has seen a newer generation: the leader's count is lost")
        if self.running is None:
            peer.quiet = False
            return effects + self.roster.say(peer, Abandon(self.plan.job_uid, self._abandoned, "forming"), now)
        if inventory.running == self.running.term:
            return effects
        if inventory.term < self.running.term:
            return effects + self.roster.say(peer, self.running, now)
        cause = "ContainerRestarted" if inventory.container_starts > 1 else "AgentLost"
        return effects + self._fault(self._suspect(cause, "stream", now, slot=peer.info.slot), now)

    def _member_closed(self, event: events.MemberClosed, now: float) -> list[Effect]:
        self.roster.closed(event.connection, now)
        return []

    def _member_said(self, event: events.MemberSaid, now: float) -> list[Effect]:
        message = event.message
        self.roster.heard(event.connection, now)
        peer = self.roster.member(event.connection)
        if peer is None or isinstance(message, Join) or message.job_uid != self.plan.job_uid:
            return []
        if message.term.epoch != self.epoch or message.slot != peer.info.slot:
            return []
        if isinstance(message, Quiesced):
            if self.running is None and message.term >= self._abandoned:
                peer.quiet = True
            return []
        peer.term = max(peer.term or message.term, message.term)
        if isinstance(message, Beat):
            return []
        if message.term != self.term:
            return self.roster.say(peer, Beat(self.plan.job_uid, self.term, peer.info.slot), now)  # older: here is ours
        match message:
            case Steps():
                return self._member_stepped(peer, message, now)
            case WorkerExited():
                return self._worker_exited(peer, message, now)
            case Saved():
                return self._saved(peer, message, now)

    def _member_stepped(self, peer: Peer, message: Steps, now: float) -> list[Effect]:
        if self.running is None:
            return []
        peer.section = message.section
        if self.recovery:
            self.recovery.section(peer.info.slot, message.section, now)
        finished = self._steps.add(peer.info.slot, message.done)
        if message.done:
            self._stepped_at = now
        return self.reports.steps(self, finished, now) if finished else []

    def _worker_exited(self, peer: Peer, message: WorkerExited, now: float) -> list[Effect]:
        if message.exit_code == 0 and self.running:
            peer.exits[message.rank] = 0
            if all(len(other.exits) == self.plan.gpus_per_node for other in self.roster.members.values()):
                self._done_at = now
                return self._finish(now)
            return []
        if message.exit_code == 0:
            return []
        suspect = replace(
            self._suspect("WorkerExited", "exit", now, slot=message.slot),
            at=min(message.at or now, now),
            rank=message.rank,
            exit_code=message.exit_code,
            error=message.error,
            user_error=message.user_error,
            log_tail=message.log_tail,
        )
        return self._fault(suspect, now)

    def _saved(self, peer: Peer, message: Saved, now: float) -> list[Effect]:
        durable = self.durability.durable
        if durable and self.durability.committed(message.state):
            return self.roster.say(peer, Committed(self.plan.job_uid, self.term, durable), now)
        return self.durability.saved(message, now)

    def _invite_refused(self, event: events.InviteRefused, now: float) -> list[Effect]:
        """Whoever answers at the address is not the member: its node was rebooted, or the address has a new owner."""
        peer = self.roster.members.get(event.slot)
        if peer is None or peer.connected or self.finished or event.inventory.job_uid != self.plan.job_uid:
            return []
        if event.inventory.term.epoch > self.epoch:
            self.superseded = True
            return []
        if not peer.is_me(event.inventory):
            self.verdicts.condemned[event.slot] = ("MemberLost", "stream")
            return self._fault(self._suspect("MemberLost", "stream", now, slot=event.slot), now)
        return []

    # -------------------------------------------------------------------------------------- faults

    def _suspect(self, cause: str, witness: str, now: float, slot: int | None = None) -> Fault:
        return Fault(cause=cause, witness=witness, at=now, noticed=now, step=self.newest_step, slot=slot)

    def _fault(self, suspect: Fault, now: float) -> list[Effect]:
        """End the generation now; what it was is judged once all are quiet and have said what they know."""
        if self.running is None:
            if self.verdicts.suspects:  # one more account of the fault that is about to be judged
                self.verdicts.suspects.append(suspect)
            return []  # between generations nothing runs that could fail
        self.verdicts.suspects.append(suspect)
        effects = self._end_generation(f"{suspect.cause}, slot {suspect.slot}", now)
        self.ledger.fault(suspect.noticed)
        if self.recovery:
            self.recovery.again(now)
        else:
            self.recovery = Recovery(suspect.at, suspect.noticed, self.ledger.highest)
        return effects

    def _end_generation(self, cause: str, now: float) -> list[Effect]:
        assert self.running is not None
        self._abandoned = self.running.term
        self.running = None
        self._done_at = None
        self.formed_at = now
        self.durability.abandon()
        if self.plan.own_store:
            self._store = None
        for peer in self.roster.members.values():
            peer.quiet = False
        return [*self.roster.say_all(Abandon(self.plan.job_uid, self._abandoned, cause), now), Persist()]

    def _judge(self, now: float) -> list[Effect]:
        """Decide what the last fault leads to."""
        verdict = self.verdicts.judge()
        if verdict is None:
            return []
        fault, decision = verdict
        rung = decision.rung if isinstance(decision, policy.Restart) else "pod"
        effects = self.reports.fault(self, fault, rung, now)
        if isinstance(decision, policy.Fail):
            failed = Finished(self.plan.job_uid, self.term, "failed", decision.reason, decision.message)
            effects += self._end(failed, now)
        return [*effects, Persist()]

    def _ask_for_epoch(self, cause: str) -> list[Effect]:
        self.superseded = True
        return [SendOperator(EpochRequest(self.plan.job_uid, self.epoch, cause))]

    # ---------------------------------------------------------------------------- between generations

    def _advance(self, now: float) -> list[Effect]:
        """Go as far as what is known allows; called after each event while no generation runs."""
        if self.finished or self.superseded or self.running:
            return []
        effects = self.durability.choose(self._abandoned) + self.durability.push(now)
        quiet = self.roster.all_quiet
        if self.verdicts.suspects and (quiet or self.verdicts.fatal):
            effects += self._judge(now)
        if self.finished or not quiet:
            return effects
        if self.recovery and self.recovery.quiesced_at is None:
            self.recovery.quiesced_at = now
        if self._stopping is not None:
            stopped = Finished(self.plan.job_uid, self.term, "stopped", "Stopped", self._stopping)
            return effects + self._end(stopped, now)
        if self._store is None:
            if not self._store_asked:
                self._store_asked = True
                effects.append(EnsureStore())
            return effects
        if self.verdicts.lost or self.verdicts.condemned or not self.durability.known or self.durability.busy:
            return effects
        return effects + self._start(now)

    def _start(self, now: float) -> list[Effect]:
        """The next generation. Its number is written before anybody hears of it."""
        assert self._store is not None
        host, port = self._store
        self.generation += 1
        self.running = Start(
            job_uid=self.plan.job_uid,
            term=self.term,
            nodes=self.plan.nodes,
            gpus_per_node=self.plan.gpus_per_node,
            rendezvous=Rendezvous(host, port, f"{self.epoch}/{self.generation}"),
            restore=self.durability.durable,
        )
        self.durability.begin()
        self._steps = StepFold(self.plan.nodes)
        self._started_at = self._stepped_at = now
        for peer in self.roster.members.values():
            peer.exits.clear()
            peer.section = "starting"
        return [Persist(), *self.reports.start(self, now), *self.roster.say_all(self.running, now)]

    def _restore_chosen(self, event: events.RestoreChosen, now: float) -> list[Effect]:
        self.durability.chosen(event.term, event.restore, now)
        return self.durability.push(now)

    def _restore_unavailable(self, event: events.RestoreUnavailable, now: float) -> list[Effect]:
        self.durability.problem = event.problem
        if event.fatal and not self.running:
            return self._end(Finished(self.plan.job_uid, self.term, "failed", "CheckpointCorrupt", event.problem), now)
        return []

    def _store_ready(self, event: events.StoreReady, now: float) -> list[Effect]:
        self._store = (event.host, event.port)
        self._store_asked = False
        return []

    def _store_lost(self, event: events.StoreLost, now: float) -> list[Effect]:
        self._store = None
        self._store_asked = False
        return self._fault(self._suspect("StoreLost", "exit", now, slot=0), now) if self.running else []

    # ------------------------------------------------------------------------------ commits and ends

    def _commit_done(self, event: events.CommitDone, now: float) -> list[Effect]:
        if not self.durability.awaits(event.restore.state):
            return []
        self.durability.done(event.restore, event.uri, now)
        self.verdicts.durable(event.restore.state.step)
        told = self.roster.say_all(Committed(self.plan.job_uid, self.term, event.restore), now)
        effects = [Persist(), *self.reports.checkpoint(self, event, now), *told, *self.durability.push(now)]
        return effects + (self._finish(now) if self.finishing else [])

    def _commit_failed(self, event: events.CommitFailed, now: float) -> list[Effect]:
        if not self.durability.awaits(event.state):
            return []
        self.durability.failed(event.problem, event.superseded, now)
        if not self.running:
            self.durability.abandon()
        return []

    def _finish(self, now: float) -> list[Effect]:
        """All workers have ended well. The job has succeeded once its last state is durable."""
        if self.plan.checkpoints:
            durable = self.durability.durable
            last = self.plan.steps or 0
            if self.durability.pending or durable is None or durable.state.step < last:
                return []
        message = f"{self.plan.steps} steps done" if self.plan.steps else "all processes exited with 0"
        return self._end(Finished(self.plan.job_uid, self.term, "succeeded", "Completed", message), now)

    def _end(self, finished: Finished, now: float) -> list[Effect]:
        self.finished = finished
        effects: list[Effect] = []
        if self.running:
            self._abandoned = self.running.term
            self.running = None
        release = Release(self.plan.job_uid, Term(self.epoch, self.generation), finished.reason)
        effects += self.roster.say_all(release, now)
        return [*effects, Persist(), *self.reports.finished(self, now)]

    def _operator_said(self, event: events.OperatorSaid, now: float) -> list[Effect]:
        match event.message:
            case FaultAck(term=term):
                self.reports.acknowledged(term)
                return [Persist()]
            case Stop(epoch=epoch, reason=reason) if epoch >= self.epoch and not self.finished:
                self._stopping = reason
                return self._end_generation(reason, now) if self.running else []
            case _:
                return []

    # ---------------------------------------------------------------------------------------- time

    def _tick(self, now: float) -> list[Effect]:
        effects = self.roster.drop_silent(now)
        if not self.finished and not self.superseded:
            effects += self.roster.invite(now)
            effects += self._watch(now) if self.running else self._wait(now)
            effects += self.durability.push(now)
        effects += self._repeat(now)
        return effects + self.reports.tick(self, now)

    def _watch(self, now: float) -> list[Effect]:
        """A generation runs: is it alive? A step needs all members, so steps prove that all are."""
        assert self.running is not None
        median = self._steps.median
        if missing := self.roster.missing:
            # Two witnesses, a closed stream and no step when one is due: the generation is over, whoever comes back.
            # Between steps (an evaluation, say), and for a script, whose steps are not seen, the stream alone says it.
            sections = {peer.section for peer in self.roster.members.values() if peer.connected}
            due = self.plan.reports_steps and median is not None and not sections & UNBOUNDED_SECTIONS
            grace = STALL_SECONDS + 2 * (median or 0.0) if due else self.plan.rejoin_grace
            since = max(min(peer.missing_since for peer in missing), self._stepped_at)
            if now - since > grace:
                slot = min(peer.info.slot for peer in missing)
                return self._fault(self._suspect("MemberLost", "stream", now, slot=slot), now)
        if self._done_at is not None:
            if now - self._done_at > FINAL_SAVE_SECONDS and not self.durability.pending:
                return self._fault(self._suspect("FinalCheckpointMissing", "progress", now), now)
            return []
        if self.plan.reports_steps:
            sections = {peer.section for peer in self.roster.members.values()}
            if now - max(self._started_at, self._stepped_at) > self.plan.hang.allowed(median, sections):
                return self._fault(self._suspect("Hang", "progress", now), now)
        return []

    def _wait(self, now: float) -> list[Effect]:
        """Members that do not come back, or can't end their workers, are given up."""
        lost = self.verdicts.missing(self.roster, self.formed_at, self.plan.rejoin_grace, now)
        if not lost:
            return []
        cause, witness = lost[min(lost)]
        return [SendOperator(ReplaceRequest(self.plan.job_uid, self.epoch, tuple(sorted(lost)), cause, witness))]

    def _repeat(self, now: float) -> list[Effect]:
        """Orders that seem not to have arrived, and a beat where there was nothing to say."""
        effects: list[Effect] = []
        for peer in self.roster.members.values():
            if not peer.connected or now - peer.said_at < BEAT_SECONDS:
                continue
            if self.running and (peer.term is None or peer.term < self.running.term):
                effects += self.roster.say(peer, self.running, now)
            elif not self.running and not self.finished and not peer.quiet:
                effects += self.roster.say(peer, Abandon(self.plan.job_uid, self._abandoned, "again"), now)
            else:
                effects += self.roster.say(peer, Beat(self.plan.job_uid, self.term, peer.info.slot), now)
        for spare in self.roster.spares.values():
            if now - spare.said_at >= BEAT_SECONDS:
                effects += self.roster.say(spare, Beat(self.plan.job_uid, self.term, spare.info.slot), now)
        return effects
