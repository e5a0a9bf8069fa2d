"""What the leader hears of replayed steps: who computed wrong numbers, and up to which step all was well. Pure.

Rank 0 tells of each replayed step by a line of its own: ``corruption`` where units disagreed, else ``replayed``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lockstep_api.messages import CorruptVerdict, Dispute, Doubt
from lockstep_trainer.protocol import dispute as disputes
from lockstep_trainer.protocol.disagreement import Accusation, Disagreement, Place, culprit, distinct
from lockstep_trainer.replay.sampling import SUSPICIOUS_STEPS

KEPT = 10
"""Verdicts that are remembered."""
PERSISTENT = 3
WINDOW = 20
"""So many disagreements without a culprit among so many replayed steps persist. One or two may be a particle's doing;
with two units the third is a fault that is always there, or one that the next two computations happened to share."""


@dataclass(frozen=True, slots=True)
class Replays:
    """What this job's replays have found. Goes with the leader's memory from epoch to epoch."""

    verdicts: tuple[CorruptVerdict, ...] = ()
    compared: int = 0
    """Steps that were replayed, seen by this leader's agents."""
    rejected: int = 0
    """Computations of steps that were dropped."""
    accused: tuple[tuple[str, str, int], ...] = ()
    """Kind of verdict, node, on how many steps."""
    doubts: tuple[int, ...] = ()
    """The last disagreements without a culprit, each by how many steps had been compared."""
    dispute: Dispute | None = None
    """A disagreement without a culprit that is looked into."""
    excused: bool = False
    """What a generation's first step shows without a culprit was looked into, and is no GPU's doing."""

    @property
    def persist(self) -> bool:
        """Disagreements without a culprit come again and again."""
        return len(self.doubts) == PERSISTENT and self.compared - self.doubts[0] < WINDOW

    def agreed(self) -> Replays:
        """A step was replayed, and all units agreed."""
        return replace(self, compared=self.compared + 1)

    def found(self, what: Disagreement, places: Mapping[int, Place], now: float) -> Replays:
        """With a disagreement in it. The runs of one step count once."""
        first = what.run == 1
        fresh = replace(self, compared=self.compared + first, rejected=self.rejected + what.rejected)
        if first and not what.calibration and culprit(what, places) is None:
            fresh = replace(fresh, doubts=(*fresh.doubts, fresh.compared)[-PERSISTENT:])
        for accusation in what.accusations:
            fresh = fresh._accused(accusation, what.step, places, now)
        return fresh

    def _accused(self, who: Accusation, step: int, places: Mapping[int, Place], now: float) -> Replays:
        at = [places[rank] for rank in who.ranks if rank in places]
        new = CorruptVerdict(
            kind=who.kind.capitalize(),
            ranks=who.ranks,
            pods=distinct(place.pod for place in at),
            nodes=distinct(place.node for place in at),
            devices=tuple(place.device for place in at if place.device),
            since=step,
            step=step,
            seen=1,
            confidence=who.confidence,
            evidence=who.evidence,
            at=now,
        )
        for number, old in enumerate(self.verdicts):
            if old.ended is None and (old.kind, old.ranks, old.pods) == (new.kind, new.ranks, new.pods):
                if step <= old.step:  # another run of the same step
                    return self
                again = replace(new, since=old.since, seen=old.seen + 1, at=old.at)
                verdicts = (*self.verdicts[:number], again, *self.verdicts[number + 1 :])
                break
        else:
            verdicts = (*self.verdicts, new)[-KEPT:]
        return replace(self._counted(new), verdicts=verdicts)

    def _counted(self, verdict: CorruptVerdict) -> Replays:
        counts = {(kind, node): count for kind, node, count in self.accused}
        for node in verdict.nodes:
            counts[verdict.kind, node] = counts.get((verdict.kind, node), 0) + 1
        return replace(self, accused=tuple((*key, count) for key, count in counts.items()))

    def doubt(self, nodes: int) -> Doubt | None:
        """What workers on so many nodes are to make again."""
        return disputes.doubt(self.dispute) if self.dispute and self.dispute.nodes == nodes else None

    def told(self, dispute: Dispute | None) -> Replays:
        """What a cut says of it, whoever made that."""
        if dispute and dispute.excused:
            return replace(self, dispute=None, excused=True)
        return replace(self, dispute=dispute)

    def outlived(self, agreed: int) -> Replays:
        """What training goes on from is of a lineage on which that step agreed: an earlier leader has settled it."""
        return replace(self, dispute=None) if self.dispute and agreed >= self.dispute.step else self

    def settled(self, step: int, nodes: int, places: Mapping[int, Place], now: float) -> Replays:
        """The step agreed, on so many nodes. Who was put aside before the dispute's own step agreed was wrong."""
        dispute = self.dispute
        if dispute is None or dispute.nodes != nodes or step < dispute.step:
            return self
        verdict = disputes.verdict(dispute, places, now)
        if verdict is None:
            return replace(self, dispute=None)
        return replace(self._counted(verdict), verdicts=(*self.verdicts, verdict)[-KEPT:], dispute=None, doubts=())

    def stepped(self, step: int, now: float) -> Replays:
        """A step was done: who was last found long ago is suspected no more."""
        return self._ended(lambda one: step - one.step > SUSPICIOUS_STEPS, now)

    def started(self, places: Mapping[int, Place], now: float) -> Replays:
        """A generation starts: who is not where it was is judged anew."""
        return self._ended(
            lambda one: one.pods != distinct(places[rank].pod for rank in one.ranks if rank in places), now
        )

    def _ended(self, over: Callable[[CorruptVerdict], bool], now: float) -> Replays:
        if not any(one.ended is None and over(one) for one in self.verdicts):
            return self
        verdicts = tuple(replace(one, ended=now) if one.ended is None and over(one) else one for one in self.verdicts)
        return replace(self, verdicts=verdicts)
