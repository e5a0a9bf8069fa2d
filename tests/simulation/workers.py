"""Simulated workers: they meet under a prefix, and a step needs all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lockstep_api.messages import Start, StateId, StepSummary
from lockstep_trainer.protocol.events import StateSaved, WorkerEnded, WorkersStepped

if TYPE_CHECKING:
    from simulation.world import Pod, World

STEP_SECONDS = 0.5
SAVE_EVERY = 5


@dataclass
class Group:
    """Workers that have met under one prefix."""

    prefix: str
    start: Start
    joined: dict[int, Worker] = field(default_factory=dict)
    step: int = 0
    broken: bool = False


@dataclass(eq=False)
class Worker:
    """One process of a pod. It outlives the pod's agent."""

    pod: Pod
    start: Start
    rank: int
    alive: bool = True
    ended: WorkerEnded | None = None
    done: list[StepSummary] = field(default_factory=list)
    saved: tuple[StateId, str] | None = None


class Workers:
    """All of the world's worker processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.groups: dict[str, Group] = {}

    def launch(self, pod: Pod, start: Start, rank: int) -> Worker:
        """Fork; imports and rendezvous take a moment."""
        worker = Worker(pod, start, rank)
        pod.workers.append(worker)
        self.world.clockwork.after(self.world.random.uniform(0.2, 1.5), lambda: self._join(worker))
        return worker

    def end(self, worker: Worker, code: int) -> None:
        """The process ends; its agent hears of it if there is one."""
        if not worker.alive:
            return
        worker.alive = False
        now = self.world.clockwork.now
        worker.ended = WorkerEnded(worker.start.term, worker.rank, code, now)
        worker.pod.worker_ended(worker)
        group = self.groups.get(worker.start.rendezvous.prefix)
        if group and group.joined.get(worker.rank) is worker and code != 0 and not group.broken:
            group.broken = True
            for other in group.joined.values():
                if other is not worker and self.world.random.random() < 0.7:  # the others hang
                    delay = self.world.random.uniform(0.01, 0.5)
                    self.world.clockwork.after(delay, lambda other=other: self.end(other, 75))  # type: ignore[misc]

    def _join(self, worker: Worker) -> None:
        if not worker.alive:
            return
        start = worker.start
        self.world.invariants.joined(worker)
        group = self.groups.setdefault(start.rendezvous.prefix, Group(start.rendezvous.prefix, start))
        group.joined[worker.rank] = worker
        if len(group.joined) == start.nodes * start.gpus_per_node and not group.broken:
            group.step = start.restore.state.step if start.restore else 0
            self.world.clockwork.after(STEP_SECONDS, lambda: self._step(group))

    def _step(self, group: Group) -> None:
        """All ranks finish one step, or nobody does."""
        workers = list(group.joined.values())
        if group.broken or not all(worker.alive for worker in workers):
            return
        names = {worker.pod.name for worker in workers}
        if any(not self.world.network.reachable(one, other) for one in names for other in names):
            self.world.clockwork.after(0.5, lambda: self._step(group))  # the collective waits
            return
        if group.step < self.world.steps:
            group.step += 1
            self.world.invariants.stepped(group)
            now = self.world.clockwork.now
            summary = StepSummary(group.step, now, STEP_SECONDS, 2.0, 64, 1.0, 1e-3, {"forward": STEP_SECONDS})
            for worker in workers:
                worker.done.append(summary)
                worker.pod.tell(WorkersStepped(group.start.term, (summary,), "forward"))
            if group.step % SAVE_EVERY == 0 or group.step == self.world.steps:
                self._save(group)
        if group.step >= self.world.steps:
            for worker in workers:
                self.world.clockwork.after(0.1, lambda worker=worker: self.end(worker, 0))  # type: ignore[misc]
            return
        self.world.clockwork.after(STEP_SECONDS, lambda: self._step(group))

    def _save(self, group: Group) -> None:
        term = group.start.term
        state = StateId(group.step, term.epoch, term.generation)
        leader = group.joined[0]
        if self.world.store.away or not self.world.network.reachable(leader.pod.name, "store"):
            return  # the next save is another chance
        # The parent is what was committed of this generation when the save began, else what was restored.
        newest = self.world.store.newest
        own = newest is not None and (newest.state.epoch, newest.state.generation) == (term.epoch, term.generation)
        parent = newest if own else group.start.restore
        leader.saved = (state, parent.manifest if parent else "")
        leader.pod.tell(StateSaved(term, *leader.saved))
