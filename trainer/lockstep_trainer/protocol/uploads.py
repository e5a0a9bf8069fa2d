"""Which kept state is brought to the store, and how far that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lockstep_api.messages import RestorePoint, StateId, Upload, Uploaded, UploadProblem
from lockstep_trainer.protocol.durability import Pending
from lockstep_trainer.protocol.lineage import order_of


@dataclass(slots=True)
class Uploads:
    """Mutable state of the leader; pure.

    One upload at a time, and what is under way is finished: an order that newer states replaced would never end where
    uploads are slower than snapshots. Then the newest kept state is next. Two orders give way: one whose state is not
    in some volume any more, and one that no slot has finished, where a last checkpoint was asked for.
    """

    every: int | None
    """Steps between durable states; None: the seconds that ``due`` is told."""
    last: int | None
    """The job's last step, where it is known."""
    order: Upload | None = None
    ordered_at: float = 0.0
    asked: int | None = None
    """A state beyond this step is wanted in the store at once."""
    seconds: float = 0.0
    """From the last finished order to its last file."""
    shares: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Where the order is for a state of another number of nodes: member's slot → slots whose copies it brings."""
    done: dict[int, Uploaded] = field(default_factory=dict)
    problems: dict[int, UploadProblem] = field(default_factory=dict)
    lost: StateId | None = None
    """Its files were brought to the store twice, and are not there: it is given up for the next one."""

    @property
    def problem(self) -> str | None:
        """Why files do not get to the store at the moment."""
        first = min(self.problems, default=None)
        return None if first is None else f"slot {first}: {self.problems[first].problem}"

    def due(self, kept: StateId, durable: RestorePoint | None, interval: float, now: float) -> bool:
        """True where ``kept`` is to be brought to the store."""
        since = durable.state.step if durable else 0
        if kept == self.lost:
            return False
        if durable is not None and kept.step <= since:
            return False
        if (self.last is not None and kept.step >= self.last) or self.wanted(kept, since):
            return True
        if self.every is not None:
            return kept.step // self.every > since // self.every
        return durable is None or now - self.ordered_at >= interval

    def wanted(self, kept: StateId, since: int) -> bool:
        """It is the last checkpoint that was asked for, and none is there or on its way."""
        order = self.order.state.step if self.order else 0
        return self.asked is not None and kept.step > self.asked >= max(order, since)

    def wants(self, kept: StateId, durable: RestorePoint | None, interval: float, now: float) -> bool:
        """True where an order for ``kept`` is to be given now; false: none is, or the one under way stands."""
        if not self.due(kept, durable, interval, now):
            return False
        if self.order is None:
            return True
        gone = any(said.gone for said in self.problems.values())
        last = self.asked is not None and kept.step > self.asked >= self.order.state.step
        gives_way = gone or (last and not self.done)
        return gives_way and order_of(kept) > order_of(self.order.state)

    def give(self, order: Upload, now: float, shares: Mapping[int, tuple[int, ...]] | None = None) -> None:
        """This is the order under way."""
        self.drop()
        self.order, self.ordered_at, self.shares = order, now, shares or {}

    def order_for(self, slot: int) -> Upload | None:
        """What the member of that slot has still to bring; None: nothing."""
        if self.order is None or slot in self.done or (self.shares and slot not in self.shares):
            return None
        return replace(self.order, slots=self.shares[slot]) if self.shares else self.order

    def uploaded(self, message: Uploaded, slots: int, now: float) -> Pending | None:
        """A slot's files are there; returns what is to be committed once all are."""
        if self.order is None or message.state != self.order.state:
            return None
        if message.slots != (self.shares.get(message.slot) if self.shares else ()) or message.again != self.order.again:
            return None  # to an order before: it says nothing of the files that are wanted now
        self.problems.pop(message.slot, None)
        known, wanted = len(self.done), len(self.shares) or slots
        self.done[message.slot] = message
        if len(self.done) < wanted or known == wanted:
            return None
        self.seconds = now - self.ordered_at
        files = tuple(file for slot in sorted(self.done) for file in self.done[slot].files)
        header = next((said.header for said in self.done.values() if said.header), "{}")
        return Pending(message.state, self.order.parent, header, files)

    def failed(self, message: UploadProblem) -> None:
        """A slot's files do not get there."""
        order = self.order_for(message.slot)
        if order is not None and message.state == order.state:
            self.problems[message.slot] = message

    def miss(self, state: StateId) -> bool:
        """Files of it are not in the store although all slots have brought theirs. They do it once more; True where
        they have."""
        order = self.order
        if order is None or order.state != state or order.again:
            self.drop()
            self.lost = state
            return True
        self.order = replace(order, again=True)
        self.done.clear()
        self.problems.clear()
        return False

    def drop(self) -> None:
        """The order is fulfilled, or its state is on no lineage any more."""
        self.order, self.shares = None, {}
        self.done.clear()
        self.problems.clear()
