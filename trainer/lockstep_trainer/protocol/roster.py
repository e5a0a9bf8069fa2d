"""The members of one epoch as their leader sees them: who has a stream, who is quiet, who is to be invited."""

from __future__ import annotations

from dataclasses import dataclass, field

from lockstep_api.messages import Copies, Descent, Inventory, Invite, Join, Membership, Origin, SlotInfo, Term, ToMember
from lockstep_trainer.protocol.effects import DropMember, Effect, PostInvite, SendMember
from lockstep_trainer.protocol.member import SILENCE_SECONDS

INVITE_SECONDS = 0.5
"""Between invitations of a member that has no stream."""


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
    """All workers of the abandoned generation and older are reaped or rest."""
    resting: int = 0
    """Workers that can go on in the same process, by its newest Quiesced."""
    term: Term | None = None
    """Newest that it said it has seen."""
    exits: dict[int, int] = field(default_factory=dict)
    """Rank → exit code, in the current generation."""
    origin: Origin | None = None
    """Of its newest Join or Quiesced."""
    descent: Descent | None = None
    """Of its newest Join."""
    snapshots: tuple[Copies, ...] = ()
    section: str = "starting"
    section_at: float = 0.0
    """Since when its workers are there."""
    invited_at: float = 0.0
    container_restarted: bool = False
    """Its container was started again between its newest Join and the one before."""
    came_at: float | None = None
    """When it first joined this roster; None: not yet."""

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


class Roster:
    """All members and spares, and the streams that they have opened."""

    def __init__(self, membership: Membership, now: float) -> None:
        self._membership = membership
        self.members = {info.slot: Peer(info, missing_since=now) for info in membership.slots}
        self.spares = {info.pod_uid: Peer(info, missing_since=now) for info in membership.spares}
        self._streams: dict[int, Peer] = {}

    @property
    def all_quiet(self) -> bool:
        """Every member has a stream and none of its workers is left."""
        return all(peer.connected and peer.quiet for peer in self.members.values())

    @property
    def resting(self) -> int:
        """Workers of all members that can go on in the same process."""
        return sum(peer.resting for peer in self.members.values())

    @property
    def missing(self) -> list[Peer]:
        """Members without a stream."""
        return [peer for peer in self.members.values() if not peer.connected]

    @property
    def newest_arrival(self) -> float | None:
        """When the last of those that are here came for the first time; None while the leader's own member, which is
        in the same process, has not come: it is the leader that is slow, and nobody's silence means anything yet."""
        if self.members[0].came_at is None:
            return None
        return max(peer.came_at for peer in self.members.values() if peer.came_at is not None)

    # ------------------------------------------------------------------------------------- streams

    def join(self, connection: int, join: Join, now: float) -> tuple[Peer | None, list[Effect]]:
        """Whose stream this is now, None: nobody's of this epoch. An older stream of the same member is dropped."""
        peer = self._of(join)
        if peer is None:
            return None, [DropMember(connection)]
        effects: list[Effect] = []
        if peer.connection is not None and peer.connection != connection:
            self._streams.pop(peer.connection, None)
            effects.append(DropMember(peer.connection))
        self._streams[connection] = peer
        peer.connection, peer.heard_at = connection, now
        peer.came_at = now if peer.came_at is None else peer.came_at
        known = peer.inventory
        peer.container_restarted = known is not None and known.container_starts < join.inventory.container_starts
        peer.inventory, peer.term, peer.descent = join.inventory, join.inventory.term, join.descent
        peer.origin, peer.snapshots = join.inventory.origin, join.inventory.snapshots
        return peer, effects

    def member(self, connection: int) -> Peer | None:
        """The member that speaks on this stream; None for spares and for streams that were replaced."""
        peer = self._streams.get(connection)
        return peer if peer and self.members.get(peer.info.slot) is peer else None

    def heard(self, connection: int, now: float) -> None:
        """Something came on this stream."""
        if peer := self._streams.get(connection):
            peer.heard_at = now

    def closed(self, connection: int, now: float) -> None:
        """A stream has ended."""
        peer = self._streams.pop(connection, None)
        if peer and peer.connection == connection:
            peer.lose(now)

    def drop_silent(self, now: float) -> list[Effect]:
        """Streams without a word for too long count as closed."""
        effects: list[Effect] = []
        for connection, peer in list(self._streams.items()):
            if now - peer.heard_at > SILENCE_SECONDS:
                effects.append(DropMember(connection))
                self.closed(connection, now)
        return effects

    def _of(self, join: Join) -> Peer | None:
        if join.job_uid != self._membership.job_uid or join.epoch != self._membership.epoch:
            return None
        if join.inventory.slot is None:
            return self.spares.get(join.inventory.pod_uid)
        peer = self.members.get(join.slot)
        return peer if peer and peer.is_me(join.inventory) else None

    # -------------------------------------------------------------------------------------- saying

    def say(self, peer: Peer, message: ToMember, now: float) -> list[Effect]:
        """To one, if it has a stream."""
        peer.said_at = now
        return [] if peer.connection is None else [SendMember(peer.connection, message)]

    def say_all(self, message: ToMember, now: float) -> list[Effect]:
        """To all members."""
        return [effect for peer in self.members.values() for effect in self.say(peer, message, now)]

    def invite(self, now: float) -> list[Effect]:
        """Ask whoever has no stream to open one."""
        effects: list[Effect] = []
        leader = self.members[0].info.address
        for spare, peers in ((False, self.members.values()), (True, self.spares.values())):
            for peer in peers:
                if not peer.connected and now - peer.invited_at >= INVITE_SECONDS:
                    peer.invited_at = now
                    info, epoch = peer.info, self._membership.epoch
                    invite = Invite(
                        self._membership.job_uid, epoch, info.slot, info.pod_uid, info.boot_id, leader, spare
                    )
                    effects.append(PostInvite(info.address, invite))
        return effects
