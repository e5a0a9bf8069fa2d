"""What must hold whatever fails (PROTOCOLS §3), checked at every join, step and commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep_api.messages import Finished, RestorePoint, Start, Term

if TYPE_CHECKING:
    from simulation.workers import Group, Worker
    from simulation.world import Pod, World


class Violation(AssertionError):
    """A rule was broken."""


class Invariants:
    """The watcher. It knows the whole world; the protocol does not."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.newest_step_term = Term(0, 0)
        self.starts: dict[str, Start] = {}
        self.joined_ranks: set[tuple[str, int]] = set()
        self.members_of: dict[Term, frozenset[str]] = {}
        self.steps = 0
        self.last_step_at = 0.0
        self.finished: Finished | None = None

    def joined(self, worker: Worker) -> None:
        """(b) A worker joins only its own prefix, and a generation's number is used once."""
        start, prefix = worker.start, worker.start.rendezvous.prefix
        if prefix != f"{start.term.epoch}/{start.term.generation}":
            raise Violation(f"(b) a worker of {start.term} joins {prefix}")
        known = self.starts.setdefault(prefix, start)
        if known != start:
            raise Violation(f"generation {prefix} was started twice: {known} and {start}")
        if (prefix, worker.rank) in self.joined_ranks:
            raise Violation(f"rank {worker.rank} joined {prefix} twice")
        self.joined_ranks.add((prefix, worker.rank))
        older = [w for w in worker.pod.workers if w.alive and w.start.term < start.term]
        if older:
            raise Violation(f"{worker.pod.name} runs workers of {older[0].start.term} and {start.term} at once")
        store = self.world.store
        if store.term.epoch == start.term.epoch and store.term <= start.term and start.restore != store.newest:
            raise Violation(f"{prefix} starts from {start.restore}, but {store.newest} is durable")

    def ordered(self, start: Start, pods: list[Pod]) -> None:
        """A Start is sent once no worker of an older generation is left on any member."""
        for pod in pods:
            older = next((worker for worker in pod.workers if worker.alive and worker.start.term < start.term), None)
            if older:
                raise Violation(f"{start.term} is started while {pod.name} still runs {older.start.term}")

    def said_quiesced(self, pod: Pod, term: Term) -> None:
        """Quiesced: no worker of this generation or older is left, and none will come."""
        pod.quiesced = max(pod.quiesced, term)
        if any(worker.alive and worker.start.term <= term for worker in pod.workers):
            raise Violation(f"{pod.name} says Quiesced({term}) and still runs it")

    def launched(self, pod: Pod, start: Start) -> None:
        """What was abandoned does not start any more."""
        if start.term <= pod.quiesced:
            raise Violation(f"{pod.name} starts {start.term} after it said Quiesced({pod.quiesced})")

    def stepped(self, group: Group) -> None:
        """(c) A step is made by all members of one generation, and by none that was given up."""
        start = group.start
        ranks = set(range(start.nodes * start.gpus_per_node))
        if set(group.joined) != ranks:
            raise Violation(f"(c) {group.prefix} makes a step without ranks {ranks - set(group.joined)}")
        pods = frozenset(worker.pod.uid for worker in group.joined.values())
        overlapping = pods & self.members_of.get(self.newest_step_term, frozenset())
        if start.term < self.newest_step_term and overlapping:
            raise Violation(f"(c) {start.term} makes a step after {self.newest_step_term}")
        self.newest_step_term = max(self.newest_step_term, start.term)
        self.members_of[start.term] = pods
        self.steps += 1
        self.last_step_at = self.world.clockwork.now

    def committed(self, point: RestorePoint, parent: RestorePoint | None) -> None:
        """(f) The chain is linear: each state descends from one that it holds, and a step is on it once."""
        lineage = [] if parent is None else [point.state for point in self._chain(parent)]
        if parent is not None and parent.state.step >= point.state.step:
            raise Violation(f"(f) {point.state} descends from the later {parent.state}")
        if point.state.step in [state.step for state in lineage]:
            raise Violation(f"(f) step {point.state.step} is on the chain twice")
        newest = self.world.store.newest
        same = newest and (newest.state.epoch, newest.state.generation) == (point.state.epoch, point.state.generation)
        if newest is not None and parent != newest and not same:
            raise Violation(f"(f) {point.state} descends from {parent}, and leaves {newest.state} off the chain")

    def ended(self, finished: Finished) -> None:
        """A job that has succeeded has its last step on the chain."""
        self.finished = finished
        newest = self.world.store.newest
        if finished.outcome == "succeeded" and (newest is None or newest.state.step != self.world.steps):
            raise Violation(f"succeeded, but the newest durable state is {newest}")
        if finished.outcome != "succeeded":
            raise Violation(f"ended for no reason: {finished}")

    def strangers(self) -> None:
        """(e) A pod that is no member runs no workers, once it can be reached."""
        members = self.world.members()
        for pod in self.world.pods.values():
            if pod.uid not in members and any(worker.alive for worker in pod.workers):
                raise Violation(f"(e) {pod.name} is no member and runs workers")

    def _chain(self, point: RestorePoint | None) -> list[RestorePoint]:
        chain = []
        while point is not None:
            chain.append(point)
            point = self.world.store.manifests[point.manifest].parent
        return chain
