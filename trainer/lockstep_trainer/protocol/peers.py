"""What the leader knows of each member: its stream, whether it is quiet, where its workers are."""

from __future__ import annotations

from dataclasses import dataclass, field

from lockstep_api.messages import Inventory, SlotInfo, Term


@dataclass(slots=True)
class Peer:
    """One member, or one spare."""

    info: SlotInfo
    missing_since: float
    """Since when there is no stream; meaningless while there is one."""
    connection: int | None = None
    heard_at: float = 0.0
    said_at: float = 0.0
    """When an order was last sent, to repeat it in time."""
    inventory: Inventory | None = None
    quiet: bool = False
    """All workers of the abandoned generation and older are reaped."""
    term: Term | None = None
    """Newest that it said it has seen."""
    exits: dict[int, int] = field(default_factory=dict)
    """Rank → exit code, in the current generation."""
    section: str = "starting"
    invited_at: float = 0.0

    @property
    def connected(self) -> bool:
        """It has a stream."""
        return self.connection is not None

    def lose(self, now: float) -> None:
        """The stream is closed, or counts as closed."""
        if self.connection is not None:
            self.connection = None
            self.missing_since = now

    def is_me(self, inventory: Inventory) -> bool:
        """The pod that was given this slot, in the same boot: a reboot keeps the uid and loses memory and address."""
        return (inventory.pod_uid, inventory.boot_id) == (self.info.pod_uid, self.info.boot_id)
