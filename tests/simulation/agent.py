"""Agents: the shell around a real core, and what it does for each effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lockstep_api.messages import FaultReport, Finished, Kept, Position, Progress, Start, Term
from lockstep_trainer.protocol import effects, events
from lockstep_trainer.protocol.member import Identity
from lockstep_trainer.protocol.node import Node
from lockstep_trainer.protocol.policy import CORRUPTION, SUSPECTED
from simulation.storage import Missing, Refused, Superseded, Unavailable
from simulation.transfers import Transfers
from simulation.written import Written

if TYPE_CHECKING:
    from simulation.pods import Pod
    from simulation.workers import Worker

JOB = "job-uid"
TICK = 0.25
LEADERLESS_SECONDS = 20.0


class Connection:
    """A stream from a member's agent to the leader's."""

    def __init__(self, member: Agent, leader: Agent, epoch: int) -> None:
        self.number = member.world.number()
        self.member, self.leader, self.epoch = member, leader, epoch
        self.open = True


class Agent:
    """One agent process: a real core, and a shell that dies with it."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self.world = pod.world
        self.alive = True
        pod.agent_starts += 1
        me = Identity(JOB, pod.name, pod.uid, pod.boot_id, pod.container_starts, pod.agent_starts)
        memory = pod.memory.read() if pod.memory else None
        now = self.world.clockwork.now
        self.node = Node(me, self.world.plan, memory, leaderless_seconds=LEADERLESS_SECONDS, now=now)
        self.stream: Connection | None = None
        self.wanted: tuple[str, int] | None = None
        self.members: dict[int, Connection] = {}
        self.leaving: set[Worker] = set()
        self.transfers = Transfers(self)
        self._queue: list[events.Event] = []
        self._draining = False

    def boot(self) -> None:
        """Look at the volume, adopt what runs, then go on."""
        self.pod.tell_held()
        self._tell_staged()
        running = self.node.member.workers.running
        if running:
            ours = {w.rank: w for w in self.pod.workers if w.start.term == running.term}
            for rank in self.node.member.workers.ranks(running):
                worker = ours.get(rank)
                if worker is None:
                    self.tell(events.WorkerEnded(running.term, rank, -9, self.world.clockwork.now))
                    continue
                if worker.done:
                    self.tell(events.WorkersStepped(running.term, tuple(worker.done[-64:]), "forward"))
                if worker.ended:
                    self.tell(worker.ended)
                elif worker.idle:
                    self.tell(worker.idle)
        for worker in self.pod.workers:  # what an earlier agent left between two generations
            if worker.alive and (running is None or worker.start.term != running.term):
                self.world.workers.end(worker, -9)
        self.carry_out(self.node.resume(self.world.clockwork.now))
        self.tick()

    def _tell_staged(self) -> None:
        """What workers have staged while there was no agent."""
        member = self.node.member
        origin = member.holdings.memory.origin
        own = [s.state for s in self.pod.volume.snapshots if s.whole and s.slot == member.workers.slot]
        own = [state for state in own if origin and Term(state.epoch, state.generation) == origin.term]
        if origin and own:
            self.tell(events.StateStaged(origin.term, max(own, key=lambda state: state.step)))

    def later(self, action: Callable[[], None]) -> None:
        """Within a moment, if the agent still lives."""

        def act() -> None:
            if self.alive:
                action()

        self.world.clockwork.after(self.world.clockwork.between(0.005, 0.05), act)

    def tick(self) -> None:
        """Four times a second."""
        if self.alive:
            self.tell(events.Tick())
            self.world.clockwork.after(TICK, self.tick)

    def tell(self, event: events.Event) -> None:
        """As the real shell: one event after another."""
        if self._draining or not self.alive:
            self._queue.append(event)
            return
        self._draining = True
        clockwork, handle = self.world.clockwork, self.node.handle
        self.carry_out(handle(event, clockwork.now))
        while self._queue and self.alive:
            self.carry_out(handle(self._queue.pop(0), clockwork.now))
        self._draining = False

    def carry_out(self, wanted: list[effects.Effect]) -> None:
        """Each effect in order. The agent may die between any two of them."""
        world = self.world
        for effect in wanted:
            if not self.alive:
                return
            world.effects_to_crash -= 1
            if world.effects_to_crash <= 0 and world.crashes():
                self.pod.kill_agent()
                return
            _PERFORM[type(effect)](self, effect)

    def die(self) -> None:
        """Connections break; the other ends learn of it if they can be reached."""
        self.alive = False
        for connection in [*self.members.values(), *([self.stream] if self.stream else [])]:
            self.hang_up(connection)

    def hang_up(self, connection: Connection) -> None:
        """Close both ends."""
        if not connection.open:
            return
        connection.open = False
        member, leader = connection.member, connection.leader

        def member_end() -> None:
            if member.stream is connection:
                member.stream = None
            if member.alive:
                member.tell(events.StreamClosed(connection.epoch))
                member.reconnect()

        def leader_end() -> None:
            leader.members.pop(connection.number, None)
            if leader.alive:
                leader.tell(events.MemberClosed(connection.number))

        clockwork, network = self.world.clockwork, self.world.network
        if network.reachable(member.pod.name, leader.pod.name):
            clockwork.after(network.delay(), member_end)
            clockwork.after(network.delay(), leader_end)
        else:
            (member_end if self is member else leader_end)()

    def reconnect(self) -> None:
        """Try until there is a stream to the leader that is wanted now."""
        if not self.alive or self.wanted is None or self.stream is not None:
            return
        address, epoch = self.wanted
        target = self.world.by_address.get(address)
        leader = target.agent if target else None
        if leader and leader.alive and self.world.network.reachable(self.pod.name, target.name):  # type: ignore[union-attr]
            self.stream = Connection(self, leader, epoch)
            self.tell(events.StreamOpened(epoch))
        else:
            self.world.clockwork.after(self.world.clockwork.between(0.1, 0.6), self.reconnect)

    # ------------------------------------------------------------------------------------- effects

    def _open_stream(self, effect: effects.OpenStream) -> None:
        if self.stream:
            connection, self.stream = self.stream, None
            self.hang_up(connection)
        self.wanted = (effect.leader, effect.epoch)
        self.world.clockwork.after(0.01, self.reconnect)

    def _close_stream(self, _: effects.CloseStream) -> None:
        self.wanted = None
        if self.stream:
            self.hang_up(self.stream)

    def _send_leader(self, effect: effects.SendLeader) -> None:
        connection = self.stream
        if connection is None or not connection.open:
            return
        message = self.world.on_the_wire(effect.message)
        if message.kind == "Quiesced":
            self.world.invariants.said_quiesced(self.pod, message.term)
        if message.kind == "Steps":
            self.world.invariants.journal.said(message, self)

        def deliver() -> None:
            if not connection.open or not connection.leader.alive:
                return
            if message.kind == "Join":
                connection.leader.members[connection.number] = connection
                connection.leader.tell(events.MemberConnected(connection.number, message))
                return
            if message.kind == "Steps":
                core = connection.leader.node.leader
                self.world.invariants.journal.heard(message, core.term if core else message.term)
            connection.leader.tell(events.MemberSaid(connection.number, message))

        leader = connection.leader.pod.name
        if message.kind == "Join":  # a handshake: it arrives first, or there is no stream
            deliver()
        else:
            self.world.network.send(self.pod.name, leader, deliver)

    def _send_member(self, effect: effects.SendMember) -> None:
        if isinstance(effect.message, Start) and self.node.leader:
            slots = self.node.leader.membership.slots
            self.world.invariants.ordered(effect.message, [self.world.pods[info.pod] for info in slots])
        if isinstance(effect.message, Kept) and self.node.leader:
            self.world.invariants.kept(effect.message, self.node.leader)
        connection = self.members.get(effect.connection)
        if connection is None or not connection.open:
            return
        message = self.world.on_the_wire(effect.message)

        def deliver() -> None:
            if connection.open and connection.member.alive:
                connection.member.tell(events.LeaderSaid(connection.epoch, message))

        self.world.network.send(self.pod.name, connection.member.pod.name, deliver)

    def _drop_member(self, effect: effects.DropMember) -> None:
        if connection := self.members.pop(effect.connection, None):
            self.hang_up(connection)

    def _post_invite(self, effect: effects.PostInvite) -> None:
        target = self.world.by_address.get(effect.address)
        if target is None:
            return
        invite = self.world.on_the_wire(effect.invite)

        def deliver() -> None:
            other = target.agent
            if other is None or not other.alive:
                return
            if other.node.member.accepts(invite):
                other.tell(events.Invited(invite))
                return
            inventory = self.world.on_the_wire(other.node.inventory(self.world.clockwork.now))

            def refuse() -> None:
                if self.alive:
                    self.tell(events.InviteRefused(invite.slot, inventory))

            self.world.network.send(target.name, self.pod.name, refuse)

        self.world.network.send(self.pod.name, target.name, deliver)

    def _send_operator(self, effect: effects.SendOperator) -> None:
        if isinstance(effect.message, Finished):
            self.world.invariants.ended(effect.message)
        report = effect.message if isinstance(effect.message, FaultReport) else None
        if report and report.cause in (CORRUPTION, SUSPECTED) and self.node.leader:
            self.world.invariants.put_aside(self.node.leader.keeping.cut, report)
        operator, message = self.world.operator, self.world.on_the_wire(effect.message)
        if isinstance(message, Progress):
            return  # read by people only

        def deliver() -> None:
            operator.heard(self, message)

        self.world.network.send(self.pod.name, "operator", deliver)

    def _launch(self, effect: effects.Launch) -> None:
        self.world.invariants.launched(self.pod, effect.start)
        self.transfers.fetch(effect.start)
        idle = {worker.rank: worker for worker in self.pod.workers if worker.alive and worker.idle}
        for rank in self.node.member.workers.ranks(effect.start):
            before = idle.pop(rank, None)
            if before and not effect.start.fresh:
                self.world.workers.go_on(before, effect.start, rank)
                continue
            if before:
                self.world.workers.end(before, -9)
            self.world.workers.launch(self.pod, effect.start, rank)
        for left in idle.values():
            self.world.workers.end(left, -9)

    def _leave(self, effect: effects.Leave) -> None:
        """Most come out of whatever they are in; the rest is killed in the end."""
        for worker in self.pod.workers:
            if worker.works and worker.start.term <= effect.term and worker not in self.leaving:
                self.leaving.add(worker)
                out = self.world.random.random() < 0.8
                delay = self.world.clockwork.between(0.01, 0.3) + (0.0 if out else 2.0)
                action = self.world.workers.leave if out else self._kill_left
                self.world.clockwork.after(delay, lambda worker=worker, action=action: action(worker))  # type: ignore[misc]

    def _kill_left(self, worker: Worker) -> None:
        if worker.works:
            self.world.workers.end(worker, -9)

    def _kill(self, effect: effects.Kill) -> None:
        for worker in self.pod.workers:
            if worker.alive and worker.start.term <= effect.term:
                delay = self.world.clockwork.between(0.01, 0.3)
                self.world.clockwork.after(delay, lambda worker=worker: self.world.workers.end(worker, -9))  # type: ignore[misc]

    def _examine(self, effect: effects.ExamineWorkers) -> None:
        def answer() -> None:
            found = [worker for worker in self.pod.workers if worker.start.term == effect.term]
            positions = [Position(each.rank, 0, "forward", "S" if each.alive else "", each.alive) for each in found]
            self.tell(events.WorkersExamined(effect.term, tuple(positions)))

        self.world.clockwork.after(self.world.clockwork.between(0.02, 1.2), answer)

    def _persist(self, _: effects.Persist) -> None:
        self.pod.memory = Written(self.node.memory(), coded=self.world.coded)

    def _choose(self, effect: effects.ChooseRestore) -> None:
        self.choosing = effect

        def attempt() -> None:
            if not self.alive or self.choosing is not effect:
                return  # asked anew: a thread of its own does one after another
            try:
                restore = self.world.store.fence(effect.term, effect.cut, effect.at)
            except Superseded:
                self.tell(events.RestoreUnavailable(effect.term, "superseded"))
            except Unavailable:
                self.tell(events.RestoreUnavailable(effect.term, "no answer"))
                self.world.clockwork.after(0.5, attempt)
            else:
                answer = events.RestoreChosen(effect.term, restore)
                self.world.clockwork.after(self.world.clockwork.between(0.01, 0.3), lambda: tell(answer))

        def tell(answer: events.RestoreChosen) -> None:
            if self.choosing is effect:  # else its task was called off, and the next one asks
                self.tell(answer)

        self.world.clockwork.after(self.world.clockwork.between(0.01, 0.3), attempt)

    def _keep(self, effect: effects.KeepSnapshot) -> None:
        self.pod.volume.kept = effect.state

    def _pin(self, effect: effects.PinSnapshot) -> None:
        self.pod.volume.pinned = effect.state

    def _drop(self, effect: effects.DropSnapshots) -> None:
        self.pod.volume.drop(effect.term, effect.step)
        self.pod.tell_held()

    def _ensure_store(self, _: effects.EnsureStore) -> None:
        answer = events.StoreReady(self.pod.name, 29500)
        self.world.clockwork.after(self.world.clockwork.between(0.01, 0.1), lambda: self.tell(answer))

    def _commit(self, effect: effects.Commit) -> None:
        """Reads ``latest``, later swaps it under the condition that it is the same. Whoever lives reads it again where
        it is not; the last request of a dead agent may still be on its way, and is refused."""
        store, clockwork = self.world.store, self.world.clockwork

        def read() -> None:
            if self.alive:
                seen = store.version
                clockwork.after(clockwork.between(0.01, 0.2) + store.slowness, lambda: swap(seen))

        def swap(seen: int) -> None:
            if not self.alive and store.version != seen:
                return
            try:
                answer: Any = events.CommitDone(effect.term, store.commit(effect))
            except Superseded:
                answer = events.CommitFailed(effect.term, effect.state, "superseded", superseded=True)
            except Refused:
                answer = events.CommitFailed(effect.term, effect.state, "refused")
            except Missing:
                answer = events.CommitFailed(effect.term, effect.state, "not there", lost=True)
            except Unavailable:
                answer = events.CommitFailed(effect.term, effect.state, "no answer")
            clockwork.after(clockwork.between(0.01, 0.3), lambda: self.tell(answer))

        clockwork.after(clockwork.between(0.01, 0.3), read)


_PERFORM: dict[type, Callable[[Any, Any], None]] = {
    effects.OpenStream: Agent._open_stream,
    effects.CloseStream: Agent._close_stream,
    effects.SendLeader: Agent._send_leader,
    effects.Launch: Agent._launch,
    effects.Leave: Agent._leave,
    effects.Kill: Agent._kill,
    effects.ExamineWorkers: Agent._examine,
    effects.Persist: Agent._persist,
    effects.PostInvite: Agent._post_invite,
    effects.SendMember: Agent._send_member,
    effects.DropMember: Agent._drop_member,
    effects.SendOperator: Agent._send_operator,
    effects.ChooseRestore: Agent._choose,
    effects.EnsureStore: Agent._ensure_store,
    effects.Commit: Agent._commit,
    effects.Journal: lambda agent, effect: agent.world.invariants.wrote(effect.line),
    effects.CopySnapshot: lambda agent, effect: agent.transfers.copy(effect),
    effects.UploadState: lambda agent, effect: agent.transfers.upload(effect),
    effects.KeepSnapshot: Agent._keep,
    effects.PinSnapshot: Agent._pin,
    effects.DropSnapshots: Agent._drop,
    effects.RequestSnapshot: lambda agent, effect: agent.world.workers.request(effect.term),
}
