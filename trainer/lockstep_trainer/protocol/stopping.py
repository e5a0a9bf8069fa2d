"""A stop that the operator has ordered: suspension, a deadline, the pod's own end.

The job ends with a last checkpoint where there is time for one. What is on its way to the store goes first: agents
bring it there without workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockstep_api.messages import Finished, MemoryPoint, Stop
from lockstep_trainer.protocol.effects import Effect

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader


@dataclass(slots=True)
class Stopping:
    """Mutable state of the leader."""

    reason: str | None = None
    """None: nobody has asked for a stop."""
    _until: float = 0.0
    """When it no longer waits for a last checkpoint."""

    @property
    def ordered(self) -> bool:
        return self.reason is not None

    def out_of_time(self, now: float) -> bool:
        return self.ordered and now >= self._until

    def order(self, leader: Leader, stop: Stop, now: float) -> list[Effect]:
        """The operator asks for it; once more may leave less time, and never more."""
        first = not self.ordered
        self.reason = stop.reason
        self._until = now + stop.seconds if first else min(self._until, now + stop.seconds)
        if not leader.running:
            return []
        if not leader.plan.checkpoints or self._until <= now:
            return leader.end_generation(stop.reason, now)
        return leader.keeping.take(leader, now, hold=stop.hold) if first else []

    def tick(self, leader: Leader, now: float) -> list[Effect]:
        """End the running generation once its state can't be lost, or there is no more time."""
        if self.reason is None or not leader.running:
            return []
        ends = leader.keeping.assured(leader) or self.out_of_time(now)
        return leader.end_generation(self.reason, now) if ends else []

    def uploads_first(self, leader: Leader, now: float) -> bool:
        """There is time for a state that is on its way to the chain."""
        return self.ordered and not self.out_of_time(now) and leader.keeping.in_flight(leader)

    def ends(self, leader: Leader, memory: MemoryPoint | None, *, ready: bool, now: float) -> bool:
        """Between generations: nothing is left to bring to the store, or no time. ``memory`` is what the next
        generation would go on from, where it is ``ready``."""
        saved = memory is None or leader.durability.committed(memory.state)
        return self.ordered and (self.out_of_time(now) or (ready and saved))

    def ends_with_pods_gone(self, leader: Leader, now: float) -> bool:
        """Nobody takes the places of pods that are gone any more, so there will be no newer state."""
        return self.ordered and not self.uploads_first(leader, now)

    def finished(self, leader: Leader) -> Finished:
        """How the job ends."""
        return Finished(leader.plan.job_uid, leader.term, "stopped", "Stopped", self.reason or "")
