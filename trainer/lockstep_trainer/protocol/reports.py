"""What the leader tells the operator and writes in the run's journal.

Fault reports are said again until they are acknowledged, so that none is lost with a stream or an operator; everything
else is a state that the next report repeats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from lockstep_api.messages import (
    Cut,
    FaultReport,
    Injected,
    Injection,
    Leaving,
    Position,
    Progress,
    Recovered,
    RestorePoint,
    SlowVerdict,
    StateId,
    StepSummary,
    Term,
)
from lockstep_trainer.protocol.corruption import Replays
from lockstep_trainer.protocol.disagreement import Disagreement, Place
from lockstep_trainer.protocol.effects import Effect, Journal, Persist, SendOperator
from lockstep_trainer.protocol.events import CommitDone
from lockstep_trainer.protocol.hangs import Blame, group_alike
from lockstep_trainer.protocol.lineage import begun_from
from lockstep_trainer.protocol.outliers import Outliers
from lockstep_trainer.protocol.policy import Fault, last_words
from lockstep_trainer.protocol.slow import blamed, over, remember

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader

PROGRESS_SECONDS = 0.5
"""Least time between two reports of progress."""
QUIET_PROGRESS_SECONDS = 2.0
"""A report is due after so long even if nothing is new."""
RESEND_SECONDS = 2.0
REMEMBER_SECONDS = 5.0
"""How much of the ledger may have to be classified again after the agent's death."""
LEDGER_SECONDS = 10.0
"""Between two ledger lines in the journal."""
PACE_STEPS = 20
"""Steps that throughput is taken over."""
HANG_RANKS = 32
"""Places of a stuck generation's ranks, and lines of its wait-for graph, that the journal gets at most."""
INJECTIONS = 10
"""Faults made on purpose that are remembered."""

Rung = Literal["inProcess", "process", "container", "pod"]
NodeBlame = Literal["", "Suspected", "Named"]
State = Literal["forming", "starting", "running", "recovering", "finishing"]


@dataclass(slots=True)
class Reports:
    """Mutable; goes with the leader's memory from epoch to epoch."""

    unacknowledged: list[FaultReport] = field(default_factory=list)
    newest: StepSummary | None = None
    newest_term: Term | None = None
    eval_loss: float | None = None
    slow: list[SlowVerdict] = field(default_factory=list)
    replays: Replays = Replays()  # noqa: RUF009  (frozen)
    outliers: Outliers = Outliers()  # noqa: RUF009  (frozen)
    injected: list[Injection] = field(default_factory=list)
    other_data: str = ""
    sequence: int = 0
    judged: list[tuple[str, str, int]] = field(default_factory=list)  # (cause, rung, how many)
    pace: list[tuple[float, int]] = field(default_factory=list)  # (end of step, its tokens)
    connected: bool = False
    dirty: bool = True
    progress_at: float = 0.0
    faults_said_at: float = 0.0
    finished_said_at: float = 0.0
    remembered_at: float = 0.0
    ledger_at: float = 0.0

    def new_leader(self, leader: Leader, now: float) -> None:
        """A leader takes over: of this epoch after its agent's death, or of the next one."""
        self.connected = False
        self.dirty = True
        self.progress_at = self.faults_said_at = self.finished_said_at = 0.0
        self.remembered_at = self.ledger_at = now

    def step_of(self, term: Term) -> int:
        """Newest step that this term has done; 0 if none."""
        return self.newest.step if self.newest and self.newest_term == term else 0

    # ------------------------------------------------------------------------------------ operator

    def operator_connected(self, leader: Leader, now: float) -> list[Effect]:
        """Tell it all that it must know."""
        self.connected = True
        self.progress_at = self.faults_said_at = self.finished_said_at = 0.0
        return self.tick(leader, now)

    def operator_closed(self) -> list[Effect]:
        """Say nothing until it is back."""
        self.connected = False
        return []

    def acknowledged(self, term: Term) -> None:
        """Faults up to this term are written in the job's status."""
        self.unacknowledged = [report for report in self.unacknowledged if report.term > term]

    def tick(self, leader: Leader, now: float) -> list[Effect]:
        """What is due."""
        effects: list[Effect] = []
        if leader.running and not leader.plan.reports_steps:
            effects += self._scripts_started(leader, now)
        if leader.running and (leader.steps_done or not leader.plan.reports_steps):
            leader.ledger.pass_time(now, leader.section)
        if not leader.finished and now - self.remembered_at >= REMEMBER_SECONDS:
            self.remembered_at = now
            effects.append(Persist())
        if not leader.finished and now - self.ledger_at >= LEDGER_SECONDS:
            effects.append(self._ledger(leader, now))
        if not self.connected:
            return effects
        if self.unacknowledged and now - self.faults_said_at >= RESEND_SECONDS:
            self.faults_said_at = now
            effects += [SendOperator(report) for report in self.unacknowledged]
        effects += self._progress(leader, now)
        if leader.finished and now - self.finished_said_at >= RESEND_SECONDS:
            self.finished_said_at = now
            effects.append(SendOperator(leader.finished))
        return effects

    def _progress(self, leader: Leader, now: float) -> list[Effect]:
        if now - self.progress_at < (PROGRESS_SECONDS if self.dirty else QUIET_PROGRESS_SECONDS):
            return []
        self.progress_at = now
        self.dirty = False
        self.sequence += 1
        durability = leader.durability
        newest = self.newest
        progress = Progress(
            job_uid=leader.plan.job_uid,
            term=leader.term,
            sequence=self.sequence,
            state=state_of(leader),
            connected=sum(peer.connected for peer in leader.roster.members.values()),
            steps=leader.plan.steps,
            newest=newest,
            tokens_per_second=self.tokens_per_second,
            tokens=trained(newest) if newest else 0,
            eval_loss=self.eval_loss,
            durable=durability.durable,
            durable_at=durability.durable_at,
            durable_uri=durability.uri,
            checkpoint_problem=leader.keeping.problem(leader),
            ledger=leader.ledger.totals(),
            kept=leader.keeping.snapshots.kept,
            cadence=leader.keeping.cadence(leader, now).figures() if leader.plan.checkpoints else {},
            durable_verified=durability.verified,
            slow=tuple(self.slow),
            corrupt=self.replays.verdicts,
            outliers=self.outliers.episodes,
            injected=tuple(self.injected),
            other_data=self.other_data,
        )
        return [SendOperator(progress)]

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last steps; None where fewer than two are known."""
        if len(self.pace) < 2 or self.pace[-1][0] <= self.pace[0][0]:
            return None
        return sum(tokens for _, tokens in self.pace[1:]) / (self.pace[-1][0] - self.pace[0][0])

    def fault_counts(self) -> dict[tuple[str, str], int]:
        """(cause, rung) → faults judged so far by this agent's leaders."""
        return {(cause, rung): count for cause, rung, count in self.judged}

    # ------------------------------------------------------------------------------- what happened

    def membership(self, leader: Leader, now: float) -> list[Effect]:
        """The epoch begins, or the leader's agent is back in it."""
        slots = {str(info.slot): {"pod": info.pod, "node": info.domain} for info in leader.membership.slots}
        return [self._line(leader, now, "membership", slots=slots, cause=leader.membership.cause)]

    def start(self, leader: Leader, now: float) -> list[Effect]:
        """A generation is started."""
        self.pace.clear()
        self.dirty = True
        self.replays = self.replays.started(places(leader), now)
        self.outliers = self.outliers.started(now)
        restore = begun_from(leader.running) if leader.running else None
        memory = leader.running is not None and leader.running.memory is not None
        phases = leader.recovery.seconds(now) if leader.recovery else {"starting": round(now - leader.formed_at, 3)}
        begun = asdict(restore) if restore else None
        return [self._line(leader, now, "start", restore=begun, memory=memory, phases=phases)]

    def steps(self, leader: Leader, finished: Iterable[StepSummary], now: float) -> list[Effect]:
        """Steps were finished by all members."""
        effects: list[Effect] = []
        recovery = leader.recovery
        leader.keeping.restore_problem = None
        for summary in finished:
            if recovery and recovery.first_step_at is None:
                recovery.first_step_at = summary.at
            leader.ledger.step(summary)
            self.newest, self.newest_term = summary, leader.term
            self.pace = [*self.pace[1 - PACE_STEPS :], (summary.at, summary.tokens)]
            effects.append(self._line(leader, now, "step", **_fields(summary)))
            self.replays = self.replays.stepped(summary.step, now)
            if recovery and summary.step > recovery.highest:
                effects += self._recovered(leader, summary.at, now)
                recovery = None
        self.dirty = True
        return effects + (self._progress(leader, now) if self.connected else [])

    def late(self, leader: Leader, finished: Iterable[StepSummary], now: float) -> list[Effect]:
        """Steps that were finished in the generation that was given up, and are heard of only now. Nothing is decided
        by them, and their time was counted by what was known then."""
        effects: list[Effect] = []
        for summary in finished:
            leader.ledger.highest = max(leader.ledger.highest, summary.step)
            if leader.recovery:
                leader.recovery.highest = max(leader.recovery.highest, summary.step)
            effects.append(self._line(leader, now, "step", **_fields(summary)))
        return effects

    def fault(self, leader: Leader, fault: Fault, rung: Rung, blame: NodeBlame, now: float) -> list[Effect]:
        """A fault was judged."""
        report = FaultReport(
            job_uid=leader.plan.job_uid,
            term=leader.term,
            at=fault.noticed,
            cause=fault.cause,
            rung=rung,
            witness=fault.witness,
            slot=fault.slot,
            rank=fault.rank,
            exit_code=fault.exit_code,
            detect_seconds=round(max(0.0, fault.noticed - fault.at), 3),
            step=fault.step,
            log_tail=fault.log_tail,
            message=last_words(fault),
            blame=blame,
        )
        self.unacknowledged.append(report)
        counts = self.fault_counts()
        counts[fault.cause, rung] = counts.get((fault.cause, rung), 0) + 1
        self.judged = [(*key, count) for key, count in counts.items()]
        self.faults_said_at = now
        self.dirty = True
        line = {name: value for name, value in asdict(report).items() if name not in ("kind", "job_uid", "term")}
        effects: list[Effect] = [self._line(leader, now, "fault", **line), self._ledger(leader, now)]
        return [*effects, SendOperator(report)] if self.connected else effects

    def hang(self, leader: Leader, found: Blame, positions: Iterable[Position], now: float) -> list[Effect]:
        """The workers of a stuck generation have said where they are."""
        late = [asdict(each) for each in found.late[:HANG_RANKS]]
        places = [asdict(each) for each in group_alike(positions)[:HANG_RANKS]]
        named = list(found.ranks)
        return [self._line(leader, now, "hang", message=found.sentence, ranks=named, late=late, places=places)]

    def slow_found(self, leader: Leader, found: SlowVerdict, now: float) -> list[Effect]:
        """Ranks are slow."""
        self.slow, self.dirty = remember(self.slow, found), True
        told = {name: value for name, value in asdict(found).items() if name not in ("at", "ended")}
        return [self._line(leader, now, "straggler", **told), Persist()]

    def no_longer_slow(self, leader: Leader, ended: SlowVerdict, now: float) -> list[Effect]:
        """They are not any more, or are not looked at any more."""
        nodes = blamed(self.slow, ended)
        self.slow, self.dirty = over(self.slow, ended, now), True
        told = {"cause": ended.cause, "ranks": list(ended.ranks), "nodes": list(nodes), "since": ended.since}
        return [self._line(leader, now, "straggler_ended", **told), Persist()]

    def injected_there(self, leader: Leader, message: Injected, now: float) -> list[Effect]:
        """Faults were made on purpose on a member; some of them may be known."""
        known = {one.id for one in self.injected}
        node = leader.roster.members[message.slot].info
        new = [
            replace(one, node=one.node or node.domain or node.pod) for one in message.injections if one.id not in known
        ]
        if not new:
            return []
        self.injected, self.dirty = [*self.injected, *new][-INJECTIONS:], True
        lines = [self._line(leader, now, "injected", **asdict(one)) for one in new]
        return [*lines, Persist()]

    def rolled_back(self, leader: Leader, cut: Cut, ranks: Iterable[int], now: float) -> list[Effect]:
        """States were cut off."""
        self.dirty = True
        return [self._line(leader, now, "rollback", step=cut.step, ranks=list(ranks), message=cut.reason)]

    def agreed(self, leader: Leader, step: int, now: float) -> list[Effect]:
        """All units agreed on a step. It may settle what was in dispute: then who was wrong is known, or that it has
        not come again."""
        dispute, before = self.replays.dispute, self.replays
        self.replays = before.settled(step, leader.plan.nodes, places(leader), now)
        if dispute is None or self.replays is before:
            return []
        self.dirty = True
        named = self.replays.verdicts[-1] if self.replays.accused != before.accused else None
        message = named.evidence if named else f"what step {dispute.step} disagreed about has not come again"
        who = {"ranks": list(named.ranks), "pods": list(named.pods), "nodes": list(named.nodes)} if named else {}
        return [self._line(leader, now, "settled", step=step, message=message, **who), Persist()]

    def checkpoint(self, leader: Leader, done: CommitDone, now: float) -> list[Effect]:
        """A state is durable."""
        self.dirty = True
        point: RestorePoint = done.restore
        state: StateId = point.state
        return [
            self._line(
                leader, now, "checkpoint", step=state.step, manifest=point.manifest,
                seconds=round(done.seconds, 3), bytes=done.size,
            )
        ]  # fmt: skip

    def kept(self, leader: Leader, state: StateId, alone: str, now: float) -> list[Effect]:
        """All slots keep a state in memory. Only what is out of the ordinary goes into the journal."""
        self.dirty = True
        return [self._line(leader, now, "kept_alone", step=state.step, message=alone)] if alone else []

    def leaving(self, leader: Leader, message: Leaving, now: float) -> list[Effect]:
        """A pod was told to end."""
        return [self._line(leader, now, "leaving", slot=message.slot, seconds=message.seconds)]

    def worker_reported(self, leader: Leader, line: dict[str, Any], now: float) -> list[Effect]:
        """Rank 0 says what is no step: an evaluation, a text, what a replayed step has shown."""
        effects: list[Effect] = []
        if line.get("kind") == "evaluate" and isinstance(line.get("loss"), float):
            self.eval_loss = line["loss"]
            self.dirty = True
        if line.get("kind") == "data_changed":
            self.other_data, self.dirty = f"up to step {line.get('step')}: {line.get('message')}", True
        if line.get("kind") == "replayed":
            self.replays = self.replays.agreed()
        if line.get("kind") == "outlier":
            self.outliers, self.dirty = self.outliers.heard(line, now), True
        if line.get("kind") == "corruption" and (found := Disagreement.read(line)):
            self.replays, self.dirty = self.replays.found(found, places(leader), now), True
            effects.append(Persist())
        if line.get("kind") == "checkpoint_problem":
            leader.keeping.restore_problem = str(line.get("message"))
            self.dirty = True
        fields = {name: value for name, value in line.items() if name != "kind"}
        return [*effects, self._line(leader, now, str(line.get("kind", "note")), **fields)]

    def finished(self, leader: Leader, now: float) -> list[Effect]:
        """The job has ended."""
        assert leader.finished is not None
        leader.ledger.pass_time(now, leader.section)
        self.finished_said_at = now
        self.dirty = True
        end = leader.finished
        effects: list[Effect] = [
            self._ledger(leader, now),
            self._line(leader, now, "finished", outcome=end.outcome, reason=end.reason, message=end.message),
        ]
        if self.connected:
            self.progress_at = 0.0
            effects += [*self._progress(leader, now), SendOperator(end)]
        return effects

    def _scripts_started(self, leader: Leader, now: float) -> list[Effect]:
        """A user's script reports no steps: it has recovered once every node runs it again."""
        assert leader.running is not None
        if leader.recovery is None or any(peer.term != leader.running.term for peer in leader.roster.members.values()):
            return []
        return self._recovered(leader, now, now)

    def _recovered(self, leader: Leader, at: float, now: float) -> list[Effect]:
        assert leader.recovery is not None
        assert leader.running is not None
        recovery, leader.recovery = leader.recovery, None
        begun = begun_from(leader.running)
        restored = begun.step if begun else 0
        lost = max(0, recovery.highest - restored)
        seconds = recovery.seconds(at)
        told = {name: value for name, value in seconds.items() if name != "detect"}  # detect is in the fault report
        memory = leader.running.memory
        source = "buddy" if recovery.source == "memory" and memory and any(memory.sources) else recovery.source
        self.dirty = True
        return [
            self._line(leader, now, "recovered", seconds=seconds, steps_lost=lost, source=source),
            SendOperator(Recovered(leader.plan.job_uid, leader.term, told, lost, at, source)),
        ]

    def _ledger(self, leader: Leader, now: float) -> Journal:
        self.ledger_at = now
        return self._line(leader, now, "ledger", classes=leader.ledger.totals())

    def _line(self, leader: Leader, now: float, kind: str, **fields: Any) -> Journal:
        term = leader.term
        return Journal({"at": now, **fields, "kind": kind, "epoch": term.epoch, "generation": term.generation})


def state_of(leader: Leader) -> State:
    """One word for where the epoch stands."""
    if leader.finishing or leader.finished:
        return "finishing"
    if leader.recovery:
        return "recovering"
    if leader.running is None:
        return "forming"
    stepped = leader.reports.step_of(leader.term) > 0
    heard = all(peer.term == leader.running.term for peer in leader.roster.members.values())
    return "running" if stepped or (not leader.plan.reports_steps and heard) else "starting"


def places(leader: Leader) -> dict[int, Place]:
    """Rank → where it computes in this epoch."""
    found: dict[int, Place] = {}
    for slot, peer in leader.roster.members.items():
        devices = peer.inventory.devices if peer.inventory else ()
        for local in range(leader.plan.gpus_per_node):
            device = devices[local] if local < len(devices) else ""
            found[slot * leader.plan.gpus_per_node + local] = Place(peer.info.pod, peer.info.domain, device)
    return found


def _fields(step: StepSummary) -> dict[str, Any]:
    """As ``asdict``, at a tenth of its cost: the leader writes this line for every step."""
    return {**{name: getattr(step, name) for name in StepSummary.__slots__}, "sections": dict(step.sections)}


def trained(step: StepSummary) -> int:
    """Tokens trained on up to ``step``, recomputed ones left out; a script that does not say has equal batches."""
    return step.trained or step.step * step.tokens
