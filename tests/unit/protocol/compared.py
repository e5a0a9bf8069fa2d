"""A leader whose workers compare what they compute, two nodes of two ranks, and what a test tells it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from lockstep_api.messages import (
    Copies,
    Cut,
    Inventory,
    Join,
    Membership,
    Quiesced,
    RestorePoint,
    SlotInfo,
    Staged,
    StateId,
    Steps,
    StepSummary,
    Term,
    Uploaded,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import (
    ChooseRestore,
    Effect,
    Journal,
    SendLeader,
    SendMember,
    SendOperator,
)
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.leader import Leader, LeaderMemory

JOB = "job"
SLOTS = tuple(SlotInfo(n, f"pod-{n}", f"uid-{n}", "boot", f"10.0.0.{n}:1", f"node-{n}") for n in range(2))
Found = TypeVar("Found")


class Run:
    """A leader of two nodes with two ranks each. Slot 0 and 1 have streams 0 and 1."""

    def __init__(
        self,
        *,
        rollback: bool = True,
        spares: int = 0,
        epoch: int = 1,
        memory: LeaderMemory | None = None,
        slots: tuple[SlotInfo, ...] = SLOTS,
    ) -> None:
        self.now, self.epoch, self.spares, self.slots = 1.0, epoch, spares, slots
        plan = JobPlan(JOB, 2, 2, steps=1000, checkpoint_every=10, memory_buddy=False, rollback=rollback, spares=spares)
        self.leader = Leader(plan, Membership(JOB, epoch, slots), memory, 0.0)
        self.effects = self.leader.begin(0.0)
        self.tell(events.OperatorConnected())

    def form(
        self, restore: RestorePoint | None, *, cut: Cut | None = None, copies: tuple[Copies, ...] = ()
    ) -> list[Effect]:
        """All come, one of them with ``cut``; the chain answers; workers can meet."""
        told: list[Effect] = []
        for slot in (0, 1):
            here = Inventory(
                JOB, self.slots[slot].pod, self.slots[slot].pod_uid, "boot", Term(self.epoch, 0), None, slot, None, 0,
                None, 1, 1,
                snapshots=tuple(replace(copy, slot=slot) for copy in copies),
            )  # fmt: skip
            told += self.tell(events.MemberConnected(slot, Join(JOB, self.epoch, slot, here, cut if slot else None)))
        told += self.quiet(*copies)
        told += self.tell(events.RestoreChosen(self.leader.abandoned, restore, "s3://x/y"))
        return told + self.tell(events.StoreReady("10.0.0.0", 1))

    def tell(self, event: events.LeaderEvent) -> list[Effect]:
        self.now += 0.1
        told = self.leader.handle(event, self.now)
        self.effects += told
        return told

    def says(self, **line: Any) -> list[Effect]:
        """Rank 0 writes a line."""
        return self.tell(events.WorkerReported(line))

    def wrong(
        self,
        step: int,
        *,
        kind: str = "permanent",
        ranks: tuple[int, ...] = (3,),
        run: int = 1,
        calibration: bool = False,
    ) -> list[Effect]:
        """Units disagreed."""
        confidence, evidence = (0.0, "computations differ") if kind == "undecided" else (1.0, "outvoted")
        one = {"kind": kind, "ranks": list(ranks), "confidence": confidence, "evidence": evidence, "point": "ffn"}
        return self.says(
            kind="corruption", step=step, run=run, rejected=run == 1, calibration=calibration, verdicts=[one]
        )  # fmt: skip

    def doubt(self, step: int, *, calibration: bool = False) -> list[Effect]:
        """Two units did, and each repeats itself."""
        return self.wrong(step, kind="undecided", ranks=(0, 2), calibration=calibration)

    def answered(self, restore: RestorePoint) -> list[Effect]:
        """All workers have ended, and the chain knows of the cut."""
        return self.quiet() + self.tell(events.RestoreChosen(self.leader.abandoned, restore, "s3://x/y"))

    def again(self, restore: RestorePoint) -> list[Effect]:
        """The next generation of the same members."""
        told = self.answered(restore) + self.tell(events.StoreReady("10.0.0.0", 1))
        assert self.leader.running is not None
        return told

    def next_epoch(self, restore: RestorePoint, slot: int) -> Run:
        """The same leader in another one, in which that slot has another pod; it runs."""
        name = f"spare-{self.epoch}"
        spare = SlotInfo(slot, name, f"uid of {name}", "boot", f"10.0.1.{self.epoch}:1", f"node of {name}")
        slots = tuple(spare if info.slot == slot else info for info in self.slots)
        run = Run(epoch=self.epoch + 1, memory=self.leader.memory(), spares=self.spares, slots=slots)
        run.form(restore)
        assert run.leader.running is not None
        return run

    def journal(self, told: list[Effect], kind: str) -> list[dict[str, Any]]:
        """Lines of that kind."""
        return [each.line for each in told if isinstance(each, Journal) and each.line["kind"] == kind]

    def done(self, step: int) -> None:
        """All finish it."""
        for slot in (0, 1):
            summary = StepSummary(step, self.now, 1.0, 2.0, 64, 1.0, 1e-3)
            self.tell(events.MemberSaid(slot, Steps(JOB, self.leader.term, slot, (summary,), "forward")))

    def quiet(self, *copies: Copies) -> list[Effect]:
        """All workers have ended."""
        told: list[Effect] = []
        for slot in (0, 1):
            held = tuple(replace(copy, slot=slot) for copy in copies)
            told += self.tell(events.MemberSaid(slot, Quiesced(JOB, self.leader.abandoned, slot, None, held)))
        return told

    def commit(self, step: int) -> RestorePoint:
        """A state of the running generation becomes durable."""
        state = self.state(step)
        for slot in (0, 1):
            self.tell(events.MemberSaid(slot, Staged(JOB, self.leader.term, slot, state, True)))
        for slot in (0, 1):
            self.tell(events.MemberSaid(slot, Uploaded(JOB, self.leader.term, slot, state, (), "{}")))
        point = point_of(state)
        self.tell(events.CommitDone(self.leader.term, point, "s3://x"))
        assert self.leader.durability.durable == point
        return point

    def state(self, step: int) -> StateId:
        return StateId(step, self.leader.epoch, self.leader.generation)


def point_of(state: StateId) -> RestorePoint:
    return RestorePoint(state, f"step-{state.step}-e{state.epoch}-g{state.generation}/manifest.json", "00")


def sent(effects: list[Effect], kind: type[Found]) -> list[Found]:
    """Messages of one kind, to whomever."""
    found = [effect.message for effect in effects if isinstance(effect, SendMember | SendOperator | SendLeader)]
    return [message for message in found if isinstance(message, kind)]


def asked(effects: list[Effect]) -> list[ChooseRestore]:
    return [effect for effect in effects if isinstance(effect, ChooseRestore)]


def trained(*, spares: int = 0) -> tuple[Run, RestorePoint]:
    """Replays agreed at steps 1 and 12; states 10 and 20 are durable."""
    run = Run(spares=spares)
    run.form(None)
    run.says(kind="replayed", step=1)
    for step in range(1, 21):
        run.done(step)
        if step == 10:
            verified = run.commit(10)
        if step == 12:
            run.says(kind="replayed", step=12)
    run.commit(20)
    return run, verified
