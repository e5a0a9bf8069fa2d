"""Pods: what of them outlives a process, and what a machine without power loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep_api.messages import Term
from lockstep_trainer.protocol import events
from simulation.volume import Volume
from simulation.workers import Worker

if TYPE_CHECKING:
    from simulation.agent import Agent
    from simulation.world import World
    from simulation.written import Written


class Pod:
    """A pod on a node of its own."""

    def __init__(self, world: World, ordinal: int, incarnation: int) -> None:
        self.world = world
        self.name = f"job-{ordinal}-{incarnation}"
        self.uid = f"uid-{self.name}"
        self.ordinal = ordinal
        self.address = f"{self.name}:29400"
        self.boots, self.boot_id = 0, ""
        self.exists = True  # for the API server
        self.scheduled = self.powered = world.room
        self.node_ready = True
        self.corrupts = False
        """Its GPU computes wrong numbers."""
        self.agent: Agent | None = None
        self.workers: list[Worker] = []
        self.memory: Written | None = None
        self.volume = Volume()
        self.quiesced = Term(0, 0)
        self.container_starts = self.agent_starts = 0
        if self.scheduled:
            self.power_on()

    def tell(self, event: events.Event) -> None:
        """To the agent, if there is one."""
        if self.agent and self.agent.alive:
            self.agent.tell(event)

    def tell_held(self) -> None:
        """What the volume holds."""
        self.tell(events.SnapshotsHeld(self.volume.copies()))

    def worker_ended(self, worker: Worker) -> None:
        """The agent sees it within milliseconds, and looks at the volume first."""

        def seen() -> None:
            self.tell_held()
            if worker.ended:
                self.tell(worker.ended)

        self.world.clockwork.after(0.005, seen)

    def worker_left(self, worker: Worker) -> None:
        """The same of one that is idle."""

        def seen() -> None:
            self.tell_held()
            if worker.idle and worker.alive:
                self.tell(worker.idle)

        self.world.clockwork.after(self.world.clockwork.between(0.005, 0.05), seen)

    def kill_agent(self) -> None:
        """The supervisor starts another one."""
        if self.agent and self.agent.alive:
            self.agent.die()
            boot = self.boots, self.container_starts

            def again() -> None:
                if (self.boots, self.container_starts) == boot:
                    self.start_agent()

            self.world.clockwork.after(self.world.clockwork.between(0.2, 1.0), again)

    def start_agent(self) -> None:
        """A new agent process."""
        if self.powered and self.exists and not (self.agent and self.agent.alive):
            self.agent = self.world.new_agent(self)
            self.agent.boot()

    def stop_processes(self) -> None:
        """All at once, nobody is told."""
        if self.agent and self.agent.alive:
            self.agent.die()
        for worker in self.workers:
            if worker.alive:
                self.world.workers.end(worker, -9)

    def restart_container(self) -> None:
        """Killed, for memory say; the volume stays."""
        if self.powered:
            self.stop_processes()
            self.workers = [worker for worker in self.workers if worker.alive]
            self.container_starts += 1
            self.world.clockwork.after(self.world.clockwork.between(0.5, 2.0), self.start_agent)

    def power_off(self) -> None:
        """The node is gone; other ends of its connections hear nothing."""
        if not self.scheduled:
            return
        self.powered = False
        self.world.network.cut_off.add(self.name)
        self.stop_processes()
        self.world.clockwork.after(5.0, self._node_not_ready)

    def power_on(self) -> None:
        """The node is back: same pod, empty volume."""
        if not self.exists or not self.scheduled:
            return
        self.world.network.cut_off.discard(self.name)
        self.powered = self.node_ready = True
        self.boots += 1
        self.boot_id = f"boot-{self.boots}"
        self.memory = None
        self.volume = Volume()
        self.workers = []
        self.quiesced = Term(0, 0)
        self.agent_starts = 0
        self.container_starts = 1
        self.world.clockwork.after(self.world.clockwork.between(0.2, 1.0), self.start_agent)

    def delete(self) -> None:
        """The operator's wish, or somebody's."""
        self.exists = False
        self.stop_processes()

    def _node_not_ready(self) -> None:
        self.node_ready = self.powered
