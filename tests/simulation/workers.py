"""Simulated workers: they meet under a prefix, restore together, and a step needs all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lockstep_api.messages import Start, StateId, StepSummary, Term
from lockstep_trainer.protocol.events import StateStaged, WorkerEnded, WorkerIdle, WorkerReported, WorkersStepped

if TYPE_CHECKING:
    from simulation.pods import Pod
    from simulation.world import World

STEP_SECONDS = 0.5
SNAPSHOT_EVERY = 2
REPLAY_EVERY = 15


@dataclass
class Group:
    """Workers that have met under one prefix."""

    prefix: str
    start: Start
    joined: dict[int, Worker] = field(default_factory=dict)
    step: int = 0
    broken: bool = False
    requested: bool = False
    """A snapshot was asked for."""
    durable: int = 0
    """Step of the state whose sample log is in the store."""
    ending: set[str] = field(default_factory=set)
    """Pods that have the last state."""
    agreed: int | None = None
    """The last step whose replay agreed."""
    replayed: bool = False
    """The first step was."""


@dataclass(eq=False)
class Worker:
    """One process of a pod in one generation. It outlives the pod's agent."""

    pod: Pod
    start: Start
    rank: int
    alive: bool = True
    idle: WorkerIdle | None = None
    """It has left its generation, and waits for another one."""
    ended: WorkerEnded | None = None
    done: list[StepSummary] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """It is in its generation."""
        return self.alive and self.idle is None


class Workers:
    """All of the world's worker processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.groups: dict[str, Group] = {}
        self.agreed: dict[StateId, int | None] = {}
        """What a snapshot says of the replays before it."""

    def launch(self, pod: Pod, start: Start, rank: int) -> Worker:
        """Fork; imports and rendezvous take a moment."""
        worker = Worker(pod, start, rank)
        pod.workers.append(worker)
        self.world.clockwork.after(self.world.clockwork.between(0.2, 1.5), lambda: self._join(worker))
        return worker

    def go_on(self, before: Worker, start: Start, rank: int) -> Worker:
        """The process of ``before``, which is idle, in another generation."""
        before.alive = False
        worker = Worker(before.pod, start, rank)
        before.pod.workers.append(worker)
        self.world.clockwork.after(self.world.clockwork.between(0.02, 0.3), lambda: self._join(worker))
        return worker

    def leave(self, worker: Worker, error: str | None = None) -> None:
        """Out of its generation. A snapshot that it was copying becomes whole first."""
        if not worker.works:
            return
        self._leave_group(worker)
        worker.idle = WorkerIdle(worker.start.term, worker.rank, self.world.clockwork.now, error)
        worker.pod.worker_left(worker)

    def end(self, worker: Worker, code: int) -> None:
        """The process ends; its agent hears of it if there is one."""
        if not worker.alive:
            return
        works = worker.works
        worker.alive = False
        now = self.world.clockwork.now
        worker.ended = WorkerEnded(worker.start.term, worker.rank, code, now)
        worker.pod.worker_ended(worker)
        if works and code != 0:
            self._leave_group(worker)

    def _leave_group(self, worker: Worker) -> None:
        """The others lose a peer: some leave by themselves, some end, some hang."""
        group = self.groups.get(worker.start.rendezvous.prefix)
        if group is None or group.joined.get(worker.rank) is not worker or group.broken:
            return
        group.broken = True
        for other in group.joined.values():
            chance, delay = self.world.random.random(), self.world.clockwork.between(0.01, 0.5)
            if other is worker or chance > 0.7:
                continue
            lost = partial(self.leave, other, "lost") if chance < 0.5 else partial(self.end, other, 75)
            self.world.clockwork.after(delay, lost)

    def _join(self, worker: Worker) -> None:
        if not worker.works:
            return
        start = worker.start
        self.world.invariants.joined(worker)
        group = self.groups.setdefault(start.rendezvous.prefix, Group(start.rendezvous.prefix, start))
        group.joined[worker.rank] = worker
        if len(group.joined) == start.nodes * start.gpus_per_node and not group.broken:
            self.world.clockwork.after(STEP_SECONDS, lambda: self._restore(group))

    def request(self, term: Term) -> None:
        """Some rank was asked for a snapshot: all take it behind the step that they are in."""
        if group := self.groups.get(f"{term.epoch}/{term.generation}"):
            group.requested = True

    def broken(self, term: Term) -> bool:
        """A generation whose processes have met can't go on."""
        group = self.groups.get(f"{term.epoch}/{term.generation}")
        return group is not None and not all(worker.works for worker in group.joined.values())

    def _restore(self, group: Group) -> None:
        """All from one state: from memory where every slot has a copy that verifies, else from the store."""
        start = group.start
        if group.broken or not all(worker.works for worker in group.joined.values()):
            return
        begun = start.restore.state if start.restore else None
        if start.memory:
            slots = {rank // start.gpus_per_node: worker.pod for rank, worker in group.joined.items()}
            found = [pod.volume.find(start.memory.state, slot) for slot, pod in slots.items()]
            if all(copy and copy.intact for copy in found):
                begun = start.memory.state
            elif self.world.gives_up:
                self.end(self.world.random.choice(list(group.joined.values())), 1)
                return
            else:
                manifest = start.restore.manifest if start.restore else None
                group.joined[0].pod.tell(WorkerReported({"kind": "restore", "source": "store", "manifest": manifest}))
        self.world.invariants.began(start.term, begun, fell_back=bool(start.memory) and begun != start.memory.state)  # type: ignore[union-attr]
        group.step = begun.step if begun else 0
        group.agreed = self.agreed.get(begun) if begun else None
        if self.world.replays and begun:
            source = "memory" if start.memory and begun == start.memory.state else "store"
            told = {"step": begun.step, "agreed": group.agreed, "manifest": _manifest(start)}
            self._say(group, kind="restore", source=source, **told)
        group.durable = start.restore.state.step if start.restore else 0
        if group.step >= self.world.steps:
            self._end_well(group)
        else:
            self._step(group)

    def _step(self, group: Group) -> None:
        """All ranks finish one step, or nobody does."""
        workers = list(group.joined.values())
        if group.broken or not all(worker.works for worker in workers):
            return
        pods = {worker.pod.name: worker.pod for worker in workers}
        if len(pods) > 1 and not self.world.network.cut_off.isdisjoint(pods):
            self.world.clockwork.after(0.5, lambda: self._step(group))  # the collective waits
            return
        if group.step < self.world.steps:
            group.step += 1
            self.world.invariants.stepped(group)
            if self.world.replays:
                self._replay(group)
            now = self.world.clockwork.now
            summary = StepSummary(group.step, now, STEP_SECONDS, 2.0, 64, 1.0, 1e-3, {"forward": STEP_SECONDS})
            for worker in workers:
                worker.done.append(summary)
            told = WorkersStepped(group.start.term, (summary,), "forward")
            for pod in pods.values():
                pod.tell(told)
            due = group.step % SNAPSHOT_EVERY == 0 or group.step == self.world.steps or group.requested
            if self.world.plan.checkpoint_every:
                due = due or group.step % self.world.plan.checkpoint_every == 0
            if due:
                group.requested = False
                for pod in pods.values():
                    self._stage(group, pod)
        if group.step >= self.world.steps:
            self._end_well(group)
            return
        self.world.clockwork.after(STEP_SECONDS, lambda: self._step(group))

    def _replay(self, group: Group) -> None:
        """Some steps, the first and one in doubt are computed twice; a GPU that is wrong is wrong each time."""
        doubt, first = group.start.doubt, not group.replayed
        doubted = doubt is not None and group.step == doubt.step
        if not first and not doubted and (group.step + self.world.seed) % REPLAY_EVERY:
            return
        group.replayed = True
        wrong = [rank for rank, worker in sorted(group.joined.items()) if worker.pod.corrupts]
        if not wrong:
            group.agreed = group.step
            self._say(group, kind="replayed", step=group.step)
            return
        found = {"kind": "permanent", "ranks": wrong[:1], "confidence": 1.0, "evidence": "outvoted"}
        if self.world.disputes and len(group.joined) > 1:
            either = sorted({wrong[0], (wrong[0] + 1) % len(group.joined)})
            found = {"kind": "undecided", "ranks": either, "confidence": 0.0, "evidence": "they differ", "point": "ffn"}
        calibration = self.world.disputes and first and doubt is None
        for run in (1, 2):
            told = {"step": group.step, "run": run, "rejected": run == 1, "calibration": calibration}
            self._say(group, kind="corruption", verdicts=[found], **told)

    def _say(self, group: Group, **line: Any) -> None:
        """A line of rank 0's."""
        group.joined[0].pod.tell(WorkerReported(line))

    def _end_well(self, group: Group) -> None:
        """Once the last state is in memory on all pods, or was restored."""
        state = self._state(group)
        names = {worker.pod.name for worker in group.joined.values()}
        begun = self.world.invariants.begun[group.start.term]
        if group.ending >= names or (begun and begun.step == state.step):
            for worker in group.joined.values():
                self.world.clockwork.after(0.1, lambda worker=worker: self.end(worker, 0))  # type: ignore[misc]
            return
        for pod in {worker.pod.name: worker.pod for worker in group.joined.values()}.values():
            if pod.name not in group.ending and not any(s.state == state for s in pod.volume.snapshots):
                self._stage(group, pod)
        if not group.broken and all(worker.works for worker in group.joined.values()):
            self.world.clockwork.after(0.2, lambda: self._end_well(group))

    def _state(self, group: Group) -> StateId:
        return StateId(group.step, group.start.term.epoch, group.start.term.generation)

    def _stage(self, group: Group, pod: Pod) -> None:
        """Copy the pod's ranks into a free buffer, beside the next step."""
        state, volume = self._state(group), pod.volume
        self.agreed[state] = group.agreed
        mine = [rank for rank, worker in group.joined.items() if worker.pod is pod]
        slot = mine[0] // group.start.gpus_per_node
        fresh = volume.begin(state, slot, group.durable, group.start.nodes, own=True)
        if fresh is None:
            return  # training never waits

        def staged() -> None:
            if fresh not in volume.snapshots or volume is not pod.volume:
                return
            if not all(group.joined[rank].alive for rank in mine):
                volume.snapshots.remove(fresh)
                return
            fresh.whole = True
            if state.step >= self.world.steps:
                group.ending.add(pod.name)
            pod.tell_held()
            pod.tell(StateStaged(group.start.term, state, 1, 0.01))

        self.world.clockwork.after(self.world.clockwork.between(0.05, 0.4), staged)


def _manifest(start: Start) -> str | None:
    return start.restore.manifest if start.restore else None
