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
    Membership,
    MemoryPoint,
    Release,
    Rendezvous,
    RestorePoint,
    Start,
    Stop,
    Term,
)
from lockstep_trainer.protocol import beginning, events, hearing, policy, watch
from lockstep_trainer.protocol.durability import Durability
from lockstep_trainer.protocol.effects import Effect, EnsureStore, Persist, SendOperator
from lockstep_trainer.protocol.hangs import Examination
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.keeping import Keeping, KeepingMemory
from lockstep_trainer.protocol.ledger import Ledger
from lockstep_trainer.protocol.lineage import begun_from
from lockstep_trainer.protocol.policy import Fault
from lockstep_trainer.protocol.progress import Recovery, StepFold
from lockstep_trainer.protocol.reports import Reports
from lockstep_trainer.protocol.roster import Roster
from lockstep_trainer.protocol.slow import SlowRanks
from lockstep_trainer.protocol.stopping import Stopping
from lockstep_trainer.protocol.verdicts import Verdicts


@dataclass(frozen=True, slots=True)
class LeaderMemory:
    """What the leader must remember over its agent's death, or takes into its next epoch."""

    membership: Membership
    generation: int = 0
    running: Start | None = None
    durable: RestorePoint | None = None
    faults: tuple[Fault, ...] = ()
    used: policy.Used = policy.Used()  # noqa: RUF009  (frozen)
    reports: Reports | None = None
    ledger: Ledger | None = None
    recovery: Recovery | None = None
    finished: Finished | None = None
    keeping: KeepingMemory | None = None
    anchor: RestorePoint | None = None
    suspects: tuple[Fault, ...] = ()
    """Of the generation that has just ended: it is judged once all members are quiet, by whoever leads then."""


class Leader:
    """The leader's state; ``handle`` is its only entry, after ``begin``."""

    def __init__(self, plan: JobPlan, membership: Membership, memory: LeaderMemory | None, now: float) -> None:
        """``memory`` of the same epoch goes on where it stood; of an older one it brings history."""
        same = memory is not None and memory.membership.epoch == membership.epoch
        # The operator decides on how many nodes an epoch trains: fewer than the job wants where there is no room.
        self.plan = plan = replace(plan, nodes=len(membership.slots))
        self.membership = membership
        self.epoch = membership.epoch
        self.generation = memory.generation if memory and same else 0
        self.roster = Roster(membership, now)
        self.running: Start | None = memory.running if memory and same else None
        self.finished: Finished | None = memory.finished if memory and same else None
        self.superseded = False
        self.spares = plan.spares
        """Pods that could take a slot, as the operator last said; before, as many as the job asks for."""
        self.durability = Durability(plan.checkpoints)
        self.keeping = Keeping(plan, memory.keeping if memory else None, same, now)
        self.durability.cut, self.durability.agreed = self.keeping.cut, self.keeping.agreed
        if memory and same and plan.checkpoints and self.generation:
            # This leader made every commit of the epoch; what it remembers may miss the last one, so the chain is
            # asked again before a restore, but not before the running generation goes on.
            self.durability.durable, self.durability.fenced = memory.durable, memory.anchor is None
            self.durability.anchor = memory.anchor
            if order := self.keeping.uploads.order:
                self.durability.doubtful.add(order.state)
        self.last_start = self.running
        """Orders of the newest generation of this agent's, also once it is over."""
        history, used = (memory.faults, memory.used if same else policy.Used()) if memory else ((), policy.Used())
        suspects = memory.suspects if memory and same else ()
        self.verdicts = Verdicts.resumed(plan.ladder, history, used, suspects)
        self.recovery = memory.recovery if memory else None
        ledger = memory.ledger if memory and same else None
        highest = memory.ledger.highest if memory and memory.ledger else 0
        phase = "starting" if membership.epoch <= 1 and not history else "recovering"
        self.ledger = ledger or Ledger(plan.nodes * plan.gpus_per_node, now, highest, phase)  # type: ignore[arg-type]
        if self.recovery is None and not same and phase == "recovering":
            # The fault took the leader itself: what it cost so far the operator knows, the rest is measured from here.
            self.recovery = Recovery(now, now, highest)
        self.reports = (memory.reports if memory and memory.reports else None) or Reports()
        self.reports.new_leader(self, now)
        self.steps = StepFold(plan.nodes)
        self.slow = SlowRanks(plan.slow)
        self._store: tuple[str, int] | None = None
        self._store_asked = False
        self.stopping = Stopping()
        self.formed_at = now
        """When the present forming began."""
        self.started_at = now
        self.stepped_at = now
        self.examination: Examination | None = None
        """Under way while the running generation is suspected of being stuck."""
        self._fresh = False
        """The next generation starts in new processes, although those of the last one rest."""
        self.done_at: float | None = None
        """When all workers had ended well."""
        self.abandoned = Term(self.epoch, self.generation)
        """The generation that must be quiet before the next one starts."""
        self._handlers: dict[type, Callable[[Any, float], list[Effect]]] = {
            events.Tick: lambda _, now: self._tick(now),
            events.OperatorConnected: lambda _, now: self.reports.operator_connected(self, now),
            events.OperatorClosed: lambda _, __: self.reports.operator_closed(),
            events.OperatorSaid: self._operator_said,
            events.MemberConnected: lambda event, now: hearing.member_connected(self, event, now),
            events.MemberClosed: lambda event, now: hearing.member_closed(self, event, now),
            events.MemberSaid: lambda event, now: hearing.member_said(self, event, now),
            events.InviteRefused: lambda event, now: hearing.invite_refused(self, event, now),
            events.RestoreChosen: self._restore_chosen,
            events.RestoreUnavailable: self._restore_unavailable,
            events.StoreReady: self._store_ready,
            events.StoreLost: self._store_lost,
            events.CommitDone: self._commit_done,
            events.CommitFailed: self._commit_failed,
            events.WorkerReported: lambda event, now: hearing.worker_reported(self, event, now),
        }

    # ------------------------------------------------------------------------------------- entries

    def begin(self, now: float) -> list[Effect]:
        """First effects: invitations, and all that can be prepared while members come."""
        effects: list[Effect] = [Persist(), *self.reports.membership(self, now), *self.roster.invite(now)]
        if self.running:  # it goes on; only the chain must be known again before the next commit
            return effects + self.durability.choose(self.term, now)
        return effects + self._advance(now)

    def handle(self, event: events.LeaderEvent, now: float) -> list[Effect]:
        """What is to be done about ``event``."""
        effects = self._handlers[type(event)](event, now)
        beat = isinstance(event, events.MemberSaid) and isinstance(event.message, Beat)
        # A beat changes nothing, and thousands of them come each second; the ticks see to what time alone makes due.
        return effects if self.running or beat else effects + self._advance(now)

    def memory(self) -> LeaderMemory:
        """What Persist writes."""
        return LeaderMemory(
            membership=self.membership,
            generation=self.generation,
            running=self.running,
            durable=self.durability.durable,
            faults=tuple(self.verdicts.history),
            used=self.verdicts.used,
            reports=self.reports,
            ledger=self.ledger,
            recovery=self.recovery,
            finished=self.finished,
            keeping=self.keeping.memory(),
            anchor=self.durability.anchor,
            suspects=tuple(self.verdicts.suspects),
        )

    @property
    def term(self) -> Term:
        """Epoch and newest generation."""
        return Term(self.epoch, self.generation)

    @property
    def newest_step(self) -> int:
        """Newest step of the running or last generation, its restore point included."""
        durable = self.durability.durable
        begun = begun_from(self.running) if self.running else durable.state if durable else None
        return max(self.reports.step_of(self.term), begun.step if begun else 0)

    @property
    def median(self) -> float | None:
        """Seconds per step of the running generation; None before the first."""
        return self.steps.median

    @property
    def finishing(self) -> bool:
        """All workers have ended well; only the last commit is missing."""
        return self.done_at is not None

    @property
    def steps_done(self) -> bool:
        """The running generation has done the last step; what follows is evaluation, generation and the last save."""
        return self.plan.steps is not None and self.newest_step >= self.plan.steps

    @property
    def section(self) -> str:
        """Where the workers are, as slot 0 says it: its first rank is the one that writes, evaluates and commits."""
        return "checkpoint" if self.finishing else self.roster.members[0].section

    # -------------------------------------------------------------------------------------- faults

    def suspect(self, cause: str, witness: str, now: float, slot: int | None = None) -> Fault:
        ran = max(0.0, now - self.started_at)
        return Fault(cause=cause, witness=witness, at=now, noticed=now, step=self.newest_step, ran=ran, slot=slot)

    def fault(self, suspect: Fault, now: float) -> list[Effect]:
        """End the generation now; what it was is judged once all are quiet and have said what they know."""
        if self.running is None:
            if self.verdicts.suspects:  # one more account of the fault that is about to be judged
                self.verdicts.accuse(suspect)
            return []  # between generations nothing runs that could fail
        self.verdicts.accuse(suspect)
        effects = self.end_generation(f"{suspect.cause}, slot {suspect.slot}", now)
        self.ledger.fault(suspect.noticed)
        if self.recovery:
            self.recovery.again(now)
        else:
            self.recovery = Recovery(suspect.at, suspect.noticed, self.ledger.highest)
        return effects

    def end_generation(self, cause: str, now: float) -> list[Effect]:
        """All workers of the running one are to leave."""
        assert self.running is not None
        self.abandoned = self.running.term
        self.running = self.examination = None
        self.done_at = None
        self.formed_at = now
        self.durability.abandon()
        if self.plan.own_store:
            self._store = None
        for peer in self.roster.members.values():
            peer.quiet = False
        return [*self.roster.say_all(self.abandon(cause), now), Persist()]

    def abandon(self, cause: str) -> Abandon:
        """The order to end the last generation."""
        return Abandon(self.plan.job_uid, self.abandoned, cause, self.keeping.cut)

    def _judge(self, now: float) -> list[Effect]:
        """Decide what the last fault leads to."""
        intact = self.roster.all_quiet and self.roster.resting == self.plan.nodes * self.plan.gpus_per_node
        verdict = self.verdicts.judge(intact=intact)
        if verdict is None:
            return []
        fault, decision = verdict
        self.keeping.ended(self, fault)
        rung = decision.rung if isinstance(decision, policy.Restart) else "pod"
        self._fresh = intact and rung != "inProcess"  # it was tried, or may not be tried again
        effects = self.reports.fault(self, fault, rung, policy.blame(fault, decision), now)
        if isinstance(decision, policy.Fail):
            failed = Finished(self.plan.job_uid, self.term, "failed", decision.reason, decision.message)
            effects += self._end(failed, now)
        return [*effects, Persist()]

    def ask_for_epoch(self, cause: str) -> list[Effect]:
        self.superseded = True
        return [SendOperator(EpochRequest(self.plan.job_uid, self.epoch, cause))]

    # ---------------------------------------------------------------------------- between generations

    def _advance(self, now: float) -> list[Effect]:
        """Go as far as what is known allows; called after each event while no generation runs."""
        if self.finished or self.superseded or self.running:
            return []
        effects = self.durability.choose(self.abandoned, now) + self.durability.push(self.term, now)
        quiet = self.roster.all_quiet
        if quiet:  # whoever has not told of a step will not any more
            effects += self.reports.late(self, self.steps.rest(), now)
        # Who is to blame for a cut may be the leader's own pod: the chain has to know of it before that is given up.
        cut_off = quiet and (self.durability.known or not self.keeping.cuts(self.abandoned))
        if self.verdicts.suspects and (cut_off or self.verdicts.fatal or self.stopping.out_of_time(now)):
            effects += self._judge(now)
        if not self.finished and self.verdicts.gone and self.stopping.ends_with_pods_gone(self, now):
            return effects + self._end(self.stopping.finished(self), now)
        if self.finished or not quiet:
            return effects
        if self.recovery and self.recovery.quiesced_at is None:
            self.recovery.quiesced_at = now
        effects += beginning.rescue(self, now)
        ready, memory = beginning.choose(self, now)
        if self.stopping.uploads_first(self, now):
            return effects
        if self.stopping.ends(self, memory, ready=ready, now=now):
            return effects + self._end(self.stopping.finished(self), now)
        if self._store is None:
            if not self._store_asked:
                self._store_asked = True
                effects.append(EnsureStore())
            return effects
        if self.verdicts.gone or not ready:
            return effects
        return effects + self._start(memory, now)

    def _start(self, memory: MemoryPoint | None, now: float) -> list[Effect]:
        """The next generation. Its number is written before anybody hears of it."""
        assert self._store is not None
        host, port = self._store
        fence = beginning.start_loose(self, memory, now)
        self.generation += 1
        self.running = Start(
            job_uid=self.plan.job_uid,
            term=self.term,
            nodes=self.plan.nodes,
            gpus_per_node=self.plan.gpus_per_node,
            rendezvous=Rendezvous(host, port, f"{self.epoch}/{self.generation}"),
            restore=self.durability.durable,
            memory=memory,
            buddies=self.keeping.buddies(self),
            fresh=self._fresh,
            cut=self.keeping.cut,
            loose=fence is not None,
            doubt=self.reports.replays.doubt(self.plan.nodes),
        )
        self._fresh = False
        self.last_start = self.running
        self.keeping.started(self, self.running)
        if self.stopping.ordered and memory is not None:  # only to bring this to the store
            self.keeping.uploads.asked = memory.state.step - 1
        self.steps = StepFold(self.plan.nodes)
        self.slow.started()
        self.started_at = self.stepped_at = now
        for peer in self.roster.members.values():
            peer.exits.clear()
            peer.section, peer.section_at = "starting", now
        effects = [Persist(), *(fence or []), *self.reports.start(self, now)]
        return [*effects, *self.roster.say_all(self.running, now)]

    def _restore_chosen(self, event: events.RestoreChosen, now: float) -> list[Effect]:
        anchor = self.durability.anchor
        if not self.durability.chosen(event, now):
            return []
        if self.running and anchor:
            return [Persist(), *beginning.tied(self, anchor, now)]
        effects = self.keeping.chosen(self, now) + self.durability.push(self.term, now)
        return effects + (self.finish(now) if self.finishing else [])

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
        return self.fault(self.suspect("StoreLost", "exit", now, slot=0), now) if self.running else []

    # ------------------------------------------------------------------------------ commits and ends

    def _commit_done(self, event: events.CommitDone, now: float) -> list[Effect]:
        if not self.durability.awaits(event.restore.state, event.term):
            return []
        self.durability.done(event.restore, event.uri, event.verified, now)
        self.keeping.uploads.drop()
        self.verdicts.durable(event.restore.state.step)
        told = self.roster.say_all(Committed(self.plan.job_uid, self.term, event.restore), now)
        effects = [Persist(), *self.reports.checkpoint(self, event, now), *told, *self.keeping.go_on(self, now)]
        return effects + (self.finish(now) if self.finishing else [])

    def _commit_failed(self, event: events.CommitFailed, now: float) -> list[Effect]:
        if not self.durability.awaits(event.state, event.term):
            return []
        lost = self.durability.failed(event.problem, event.superseded, now, lost=event.lost)
        if not self.running:
            self.durability.abandon()
        return self.keeping.missed(self, event.state, now) if lost else []

    def finish(self, now: float) -> list[Effect]:
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
            self.abandoned = self.running.term
            self.running = None
        release = Release(self.plan.job_uid, Term(self.epoch, self.generation), finished.reason)
        effects += self.roster.say_all(release, now)
        return [*effects, Persist(), *self.reports.finished(self, now)]

    def _operator_said(self, event: events.OperatorSaid, now: float) -> list[Effect]:
        match event.message:
            case FaultAck(term=term, spares=spares):
                self.reports.acknowledged(term)
                self.spares = self.spares if spares is None else spares
                return [Persist()]
            case Stop() as stop if stop.epoch >= self.epoch and not self.finished:
                return self.stopping.order(self, stop, now)
            case _:
                return []

    # ---------------------------------------------------------------------------------------- time

    def _tick(self, now: float) -> list[Effect]:
        effects = self.roster.drop_silent(now)
        if not self.finished and not self.superseded:
            effects += self.roster.invite(now)
            effects += watch.watch(self, now) if self.running else watch.wait(self, now)
            effects += self.stopping.tick(self, now)
            effects += self.durability.push(self.term, now) + self.keeping.repeat(self, now)
        effects += watch.repeat(self, now)
        return effects + self.reports.tick(self, now)
