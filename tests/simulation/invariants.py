"""What must hold whatever fails (docs/design/membership.md), checked at every join, step and commit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lockstep_api.messages import Cut, FaultReport, Finished, Kept, RestorePoint, Start, StateId, Term
from lockstep_trainer.protocol.policy import SUSPECTED
from simulation.journal import Journal

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader
    from simulation.pods import Pod
    from simulation.workers import Group, Worker
    from simulation.world import World


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
        self.journal = Journal()
        self.begun: dict[Term, StateId | None] = {}
        """What each generation really began from."""
        self.fell_back = False
        """Some generation had to begin from an older state than it was told to."""
        self.newest_kept: Kept | None = None
        self.corrupt: set[StateId] = set()
        """States of which some copy was damaged."""
        self.cuts: list[Cut] = []
        """Of faults that were judged."""
        self.wrong: set[str] = set()
        """Pods whose GPUs compute wrong numbers, or may have done so."""
        self.named: list[str] = []
        """Pods that were named by what a spare computed in their place."""
        self.newest_step = 0
        self.told_to_stop: set[int] = set()
        """Epochs in which the operator has said so."""
        self.stop_at: int | None = None
        """Newest step when the operator ended the job."""
        self.steps = 0
        self.last_step_at = 0.0
        self.finished: Finished | None = None

    def nodes_of(self, state: StateId) -> int:
        """On how many nodes the state was made."""
        return self.starts[f"{state.epoch}/{state.generation}"].nodes

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
        self._has_record(start.term)
        older = [w for w in worker.pod.workers if w.works and w.start.term < start.term]
        if older:
            raise Violation(f"{worker.pod.name} runs workers of {older[0].start.term} and {start.term} at once")
        store = self.world.store
        if start.loose:
            return  # what it may commit is looked at when it does
        if store.term.epoch != start.term.epoch or store.term > start.term:
            return
        newest = store.newest.state if store.newest else None
        if start.memory and self.nodes_of(start.memory.state) != start.nodes:
            raise Violation(f"{prefix} starts from {start.memory.state}, whose shards are of another number of nodes")
        if start.memory is None and start.restore != store.newest:
            raise Violation(f"{prefix} starts from {start.restore}, but {store.newest} is durable")
        if start.memory and newest and not self.descends(start.memory.state, newest):
            raise Violation(f"{prefix} starts from {start.memory.state}, which does not descend from {newest}")
        self._has_rescued(start, newest)

    def _has_rescued(self, start: Start, newest: StateId | None) -> None:
        """What all kept on another number of nodes was brought to the store before this one begins, where its members
        have a copy of each slot and no cut excludes it."""
        kept = self.newest_kept
        if kept is None or start.term.generation != 1 or self.nodes_of(kept.state) == start.nodes:
            return
        if kept.state in self.corrupt or (newest and not self.descends(kept.state, newest)):
            return
        pods = [self.world.pods[info.pod] for info in self.world.status["slots"].values()]
        held = {one.slot for pod in pods for one in pod.volume.snapshots if one.whole and one.state == kept.state}
        missed = newest is None or newest.step < kept.state.step
        # A cut holds as soon as it is decided; it is judged later, or never where its leader is told to stop meanwhile.
        spoiled = any(self.spoiled(kept.state, cut) for cut in (*self.cuts, start.cut) if cut)
        if missed and held >= set(range(self.nodes_of(kept.state))) and not spoiled:
            raise Violation(f"{start.term} starts from {newest} although its members hold all of {kept.state}")

    def _has_record(self, term: Term) -> None:
        """The fault that ended a generation which its epoch has outlived is on record. Who is told to stop may end it
        without one, to bring what memory holds to the store."""
        before = Term(term.epoch, term.generation - 1)
        if before.generation and before not in self.journal.faults and term.epoch not in self.told_to_stop:
            raise Violation(f"{term} follows {before}, and nothing says what ended that")

    def began(self, term: Term, state: StateId | None, *, fell_back: bool) -> None:
        """Workers have restored. What a cut excludes, or descends from that, is not started from any more."""
        for cut in self.cuts:
            if cut.term < term and self.spoiled(state, cut):
                raise Violation(f"{term} begins from {state}, beyond step {cut.step} that {cut.term} was cut at")
        self._has_lines(term, state)
        self.begun[term] = state
        self.fell_back = self.fell_back or fell_back
        self.newest_step = state.step if state else 0

    def _has_lines(self, term: Term, state: StateId | None) -> None:
        """A step that an epoch goes on from is in the journal. What the leader of another one did not hear is lost
        with it."""
        if state is None or state.epoch != term.epoch:
            return
        before = self.begun[Term(state.epoch, state.generation)]
        if missing := self.journal.missing(state, before.step if before else 0):
            raise Violation(f"{term} begins from {state}, and the journal has no line of its steps {missing}")

    def wrote(self, line: dict[str, Any]) -> None:
        """A leader's line. Who it names by what a spare has computed was wrong."""
        self.journal.write(line)
        for pod in line.get("pods", ()) if line["kind"] == "settled" else ():
            self.named.append(pod)
            if pod not in self.wrong:
                raise Violation(f"{pod} is named, and computed nothing wrong: {line['message']}")

    def put_aside(self, cut: Cut | None, report: FaultReport) -> None:
        """A fault of wrong numbers is told of: its cut holds whatever comes."""
        if any(known.term == report.term for known in self.cuts):
            return  # said again
        if cut is None or cut.term < report.term:  # a later one: the operator was away, and it came to another cut
            raise Violation(f"{report} without a cut: {cut}")
        wrong = self.starts[f"{report.term.epoch}/{report.term.generation}"]
        again = report.cause == SUSPECTED and report.rung == "process"
        if not again and (report.slot is None or report.rung != "pod" or wrong.nodes <= report.slot):
            raise Violation(f"nobody is put aside: {report}")
        self.cuts.append(cut)
        if self.stop_at is not None:  # told to stop, and what it would have saved is worth nothing
            self.stop_at = min(self.stop_at, self.durable_before(cut))

    def durable_before(self, cut: Cut) -> int:
        """The newest durable step that ``cut`` leaves, 0 if none."""
        chain = self._chain(self.world.store.newest)
        return next((point.state.step for point in chain if not self.spoiled(point.state, cut)), 0)

    def spoiled(self, state: StateId | None, cut: Cut) -> bool:
        """True where a state that ``cut`` excludes is ``state`` itself or an ancestor."""
        while state is not None:
            term = Term(state.epoch, state.generation)
            if term <= cut.term and state.step > cut.step:
                return True
            state = self.begun[term]
        return False

    def descends(self, state: StateId | None, ancestor: StateId) -> bool:
        """True where ``ancestor`` is ``state`` itself or a state that it was trained from."""
        while state is not None:
            if (state.epoch, state.generation) == (ancestor.epoch, ancestor.generation):
                return ancestor.step <= state.step
            state = self.begun[Term(state.epoch, state.generation)]
        return False

    def kept(self, kept: Kept, leader: Leader) -> None:
        """The leader says that all have a state, its buddies included."""
        self.newest_kept = kept if leader.running and not leader.keeping.snapshots.alone else None

    def survives(self, group: Group) -> None:
        """§5: without any one node there is still a complete set of what was kept, or of a newer state."""
        kept = self.newest_kept
        now = StateId(group.step, group.start.term.epoch, group.start.term.generation)
        if kept is None or kept.term != group.start.term or not self.descends(now, kept.state):
            return  # nothing was kept yet, or its copies were corrupt and the workers began from the store
        if kept.state in self.corrupt or not self.world.plan.memory_buddy or group.start.nodes == 1:
            return  # its other copy makes up for that, and for nothing more; a node alone has no buddy
        gpus = group.start.gpus_per_node
        pods = {rank // gpus: worker.pod for rank, worker in group.joined.items()}
        kept_at = {slot: pod.volume.holding(kept.state) for slot, pod in pods.items()}
        for lost in pods:
            if set().union(*(slots for holder, slots in kept_at.items() if holder != lost)) == pods.keys():
                continue  # nearly always
            found: dict[StateId, set[int]] = {}
            for holder, pod in pods.items():
                for copy in pod.volume.snapshots if holder != lost else ():
                    if copy.whole:
                        found.setdefault(copy.state, set()).add(copy.slot)
            whole = [state for state, slots in found.items() if slots == pods.keys()]
            if not any(self.descends(state, kept.state) for state in whole):
                raise Violation(f"without slot {lost} nothing is left of {kept.state}, which was kept, only {found}")

    def ordered(self, start: Start, pods: list[Pod]) -> None:
        """A Start is sent once no worker of an older generation is at work on any member."""
        for pod in pods:
            older = next((worker for worker in pod.workers if worker.works and worker.start.term < start.term), None)
            if older:
                raise Violation(f"{start.term} is started while {pod.name} still runs {older.start.term}")

    def said_quiesced(self, pod: Pod, term: Term) -> None:
        """Quiesced: no worker of this generation or older is at work, and none will come."""
        pod.quiesced = max(pod.quiesced, term)
        if any(worker.works and worker.start.term <= term for worker in pod.workers):
            raise Violation(f"{pod.name} says Quiesced({term}) and still runs it")
        if len([worker for worker in pod.workers if worker.alive]) > self.world.plan.gpus_per_node:
            raise Violation(f"{pod.name} has more processes than GPUs")

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
        self.newest_step = group.step
        resting = [rank for rank, worker in group.joined.items() if not worker.works]
        if resting:
            raise Violation(f"{group.prefix} makes a step, and its ranks {resting} have left it")
        self.survives(group)
        self.last_step_at = self.world.clockwork.now

    def committed(self, point: RestorePoint, parent: RestorePoint | None) -> None:
        """(f) The chain is linear: each state descends from one that it holds, and a step is on it once."""
        lineage = [] if parent is None else [point.state for point in self._chain(parent)]
        if parent is not None and parent.state.step >= point.state.step:
            raise Violation(f"(f) {point.state} descends from the later {parent.state}")
        if point.state.step in [state.step for state in lineage]:
            raise Violation(f"(f) step {point.state.step} is on the chain twice")
        if parent is not None and not self.descends(point.state, parent.state):
            raise Violation(f"(f) {point.state} was not trained from {parent.state}")
        for cut in self.cuts:
            if self.spoiled(point.state, cut):
                raise Violation(f"{point.state} becomes durable, beyond step {cut.step} that {cut.term} was cut at")
        newest = self.world.store.newest
        if newest is not None and parent != newest and not self.fell_back:
            raise Violation(f"(f) {point.state} descends from {parent}, and leaves {newest.state} off the chain")

    def ended(self, finished: Finished) -> None:
        """A job that has succeeded has its last step on the chain."""
        if finished.outcome == "stopped" and self.world.operator.stopping is None:
            return  # to go on with more nodes
        self.finished = finished
        self.world.clockwork.over = True
        newest = self.world.store.newest
        if finished.outcome == "succeeded" and (newest is None or newest.state.step != self.world.steps):
            raise Violation(f"succeeded, but the newest durable state is {newest}")
        if finished.outcome == "stopped" and self.stop_at is not None:
            if (newest.state.step if newest else 0) < self.stop_at - 2:  # the leader hears of steps a moment late
                raise Violation(f"stopped at step {self.stop_at} with time to spare, but {newest} is durable")
        elif finished.outcome != "succeeded":
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
