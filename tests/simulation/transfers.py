"""What an agent's shell does with snapshots: to the buddy, to the store, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep_api.messages import Start, StoredFile
from lockstep_trainer.protocol import effects, events
from simulation.storage import Unavailable
from simulation.volume import Snapshot

if TYPE_CHECKING:
    from simulation.agent import Agent
    from simulation.pods import Pod

FETCH_TRIES = 4
BUSY_CHANCE = 0.05
"""That the writer has not let go of a snapshot yet which is already seen."""


class Transfers:
    """One agent's; they end with it."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._pod: Pod = agent.pod
        self._world = agent.world
        self._copying: effects.CopySnapshot | None = None
        self._uploading: effects.UploadState | None = None

    @property
    def _slot(self) -> int:
        slot = self._agent.node.member.workers.slot
        assert slot is not None
        return slot

    def held(self) -> None:
        """Tell what is there."""
        self._pod.tell_held()

    # ---------------------------------------------------------------------------------------- buddy

    def copy(self, effect: effects.CopySnapshot) -> None:
        """To the buddy, until it has it or a newer one is to be copied."""
        self._copying = effect
        draw = self._world.random
        seconds = (
            self._world.clockwork.between(1.0, 4.0)
            if self._world.network.faulty and draw.random() < 0.1
            else self._world.clockwork.between(0.1, 0.5)
        )
        source = self._pod.volume.find(effect.state, self._slot)
        if source:
            source.readers.add(self._agent)
        target = self._world.by_address.get(effect.buddy)

        def arrive() -> None:
            if source:
                source.readers.discard(self._agent)
            if not self._agent.alive or self._copying is not effect:
                return
            if source is None or not source.intact:
                self._discard(source)
                return
            if draw.random() < BUSY_CHANCE:
                self._copy_again(effect, 0.2)
                return
            reachable = target is not None and self._world.network.reachable(self._pod.name, target.name)
            up = reachable and target.agent is not None and target.agent.alive  # type: ignore[union-attr]
            if up and self._received(target, effect, source):  # type: ignore[arg-type]
                self._agent.later(lambda: self._agent.tell(events.StateCopied(effect.state)))
            else:
                self._copy_again(effect, 0.5)

        self._world.clockwork.after(seconds, arrive)

    def _copy_again(self, effect: effects.CopySnapshot, pause: float) -> None:
        """What can't be copied yet is tried until it is, or is gone, or something newer is to be copied."""

        def again() -> None:
            if self._copying is effect and self._agent.alive:
                self.copy(effect)

        self._world.clockwork.after(pause, again)

    def _discard(self, corrupt: Snapshot | None) -> None:
        if corrupt in self._pod.volume.snapshots:
            self._pod.volume.snapshots.remove(corrupt)
        self.held()

    def _received(self, target: Pod, effect: effects.CopySnapshot, source: Snapshot) -> bool:
        """The buddy verifies what it got before it counts."""
        state = effect.state
        if target.volume.find(state, source.slot):
            return True
        fresh = target.volume.begin(state, source.slot, source.durable, source.nodes, own=False, keep=effect.keep)
        if fresh is None:
            return False
        fresh.whole = True
        target.tell_held()
        return True

    # ---------------------------------------------------------------------------------------- store

    def upload(self, effect: effects.UploadState) -> None:
        """To the store, until it is there or another order comes."""
        self._uploading = effect
        found = [self._pod.volume.find(effect.state, slot) for slot in effect.slots or (self._slot,)]
        sources = [source for source in found if source and source.intact]
        if len(sources) < len(found):
            for source in found:
                if source and not source.intact:
                    self._discard(source)
            self._agent.later(lambda: self._failed(effect, "not in memory any more", gone=True))
            return
        for source in sources:
            source.readers.add(self._agent)

        def done() -> None:
            files = tuple(StoredFile(f"r{source.slot}", 1, f"{effect.state}") for source in sources)
            if self._agent.alive and self._uploading is effect:
                try:
                    for source, file in zip(sources, files, strict=True):
                        self._world.store.put(effect.state, source.slot, file)
                except Unavailable:
                    self._failed(effect, "no answer", gone=False)
                    self._world.clockwork.after(0.7, done)
                    return
                header = "{}" if any(source.slot == 0 for source in sources) else None
                self._agent.tell(events.StateUploaded(effect.state, files, header))
            for source in sources:
                source.readers.discard(self._agent)

        self._world.clockwork.after(self._world.clockwork.between(0.3, 3.0), done)

    def _failed(self, effect: effects.UploadState, problem: str, *, gone: bool) -> None:
        if self._agent.alive and self._uploading is effect:
            self._agent.tell(events.UploadFailed(effect.state, problem, gone))

    # --------------------------------------------------------------------------------------- restore

    def fetch(self, start: Start, tries: int = FETCH_TRIES) -> None:
        """Before the workers restore: the slot's copy, from whoever has it. What can't be had, they will miss."""
        if start.memory is None or not self._agent.alive:
            return
        slot, volume = self._slot, self._pod.volume
        address = start.memory.sources[slot]
        if not address or volume.find(start.memory.state, slot):
            return
        other = self._world.by_address.get(address)
        reachable = other is not None and self._world.network.reachable(self._pod.name, other.name)
        found = (
            other.volume.find(start.memory.state, slot)
            if reachable and other and other.agent and other.agent.alive
            else None
        )
        if found and found.intact:
            fresh = volume.begin(start.memory.state, slot, found.durable, found.nodes, own=True)
            if fresh:
                fresh.whole = True
                self.held()
        elif tries > 1:
            self._world.clockwork.after(0.2, lambda: self.fetch(start, tries - 1))
