"""Units disagree and nobody can say who is wrong: what is tried. Pure.

Two units that each repeat themselves are such a case, and ranks of several pods that are accused together. So:

1. The run goes back, in new processes on the same pods, and the step is made again and compared: a bit that flipped in
   memory is gone then.
2. Where it disagrees again, and pods are kept ready as spares, one pod after the other is put aside for a spare. The
   first without which the step agrees was wrong.
3. Where it disagrees without any of them it is no GPU.

Nobody is named by what does not come again: a step that agrees without a pod says something about that pod only if it
disagreed with it, twice. The dispute goes with the cut that each disagreement makes: members write that down, and so a
new leader knows it too, be it the old one's pod that was put aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from lockstep_api.messages import Aside, CorruptVerdict, Dispute, Doubt
from lockstep_trainer.protocol.disagreement import Disagreement, Place, distinct


def doubt(dispute: Dispute) -> Doubt:
    """What workers are told of it."""
    return Doubt(dispute.step, dispute.points)


def without(dispute: Dispute, slot: int, places: Mapping[int, Place], gpus_per_node: int) -> Dispute:
    """The pod of ``slot`` is put aside."""
    ranks = tuple(rank for rank in dispute.ranks if rank // gpus_per_node == slot and rank in places)
    at = [places[rank] for rank in ranks]
    devices = tuple(place.device for place in at if place.device)
    return replace(dispute, aside=(*dispute.aside, Aside(slot, at[0].pod, at[0].node, ranks, devices)))


def verdict(dispute: Dispute, now: float) -> CorruptVerdict | None:
    """The step has agreed: who was wrong. None: nobody was put aside, and it did not come again."""
    if not dispute.aside:
        return None
    who = dispute.aside[-1]
    return CorruptVerdict(
        kind="Permanent",
        ranks=who.ranks,
        pods=(who.pod,),
        nodes=(who.node,),
        devices=who.devices,
        since=dispute.since,
        step=dispute.step,
        seen=dispute.seen,
        confidence=1.0,
        evidence=f"without {who.pod}, step {dispute.step} agrees; with it, {dispute.evidence}",
        at=now,
        ended=now,
    )


Answer = Literal["again", "give up"] | int
"""again: go back, on the same pods. A slot: go back, and put its pod aside."""


def answer(
    before: Dispute | None, found: Disagreement, *, nodes: int, gpus_per_node: int, spares: int, persist: bool
) -> tuple[Dispute, Answer]:
    """What is to be tried after ``found``, and what is known then. ``before`` is the dispute that stands; ``persist``:
    disagreements come again and again, be it at other steps."""
    ranks = distinct(rank for each in found.accusations for rank in each.ranks)
    points = distinct(each.point for each in found.accusations)
    evidence = "; ".join(each.evidence for each in found.accusations)
    if before is None or before.nodes != nodes:
        fresh = Dispute(found.step, found.step, 1, points, ranks, nodes, found.calibration, evidence)
        return fresh, "give up" if persist else "again"
    points = distinct((*before.points, *points))
    known = replace(before, step=found.step, seen=before.seen + 1, points=points, ranks=ranks, evidence=evidence)
    tried = {each.slot for each in known.aside}
    # The leader's own pod comes last: another leader has to find its way first.
    left = sorted({rank // gpus_per_node for rank in ranks} - tried, key=lambda slot: (slot == 0, slot))
    if spares and left:
        return known, left[0]
    return known, "give up" if persist or known.aside else "again"
