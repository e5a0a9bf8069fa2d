"""Units disagree and nobody can say who is wrong: what is tried. Pure.

Two units that each repeat themselves are such a case, and ranks of several pods that are accused together. So:

1. The run goes back, in new processes on the same pods, and the step is made again and compared: a bit that flipped in
   memory is gone then.
2. Where it disagrees again, and a spare is ready, one pod after the other is put aside for it. The first without which
   the step agrees was wrong. Without one nobody is put aside: a suspicion is no reason to wait for room.
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
    ranks = tuple(rank for rank in dispute.ranks if rank // gpus_per_node == slot)
    at = [places[rank] for rank in ranks]
    devices = tuple(place.device for place in at if place.device)
    return replace(dispute, aside=(*dispute.aside, Aside(slot, at[0].pod, at[0].node, ranks, devices)))


def verdict(dispute: Dispute, places: Mapping[int, Place], now: float) -> CorruptVerdict | None:
    """The step has agreed, computed at ``places``: who was wrong. None: nobody was put aside, and it did not come
    again; or another one of the accused is gone too, for a reason of its own."""
    if not dispute.aside or dispute.aside[-1] not in _gone(dispute, places):
        return None
    who = dispute.aside[-1]
    others = [(rank, pod) for rank, pod in zip(dispute.ranks, dispute.pods, strict=True) if pod != who.pod]
    if any(rank not in places or places[rank].pod != pod for rank, pod in others):
        return None
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
    before: Dispute | None,
    found: Disagreement,
    places: Mapping[int, Place],
    *,
    nodes: int,
    gpus_per_node: int,
    spares: int,
    persist: bool,
) -> tuple[Dispute, Answer]:
    """What is to be tried after ``found``, and what is known then. ``before`` is the dispute that stands; ``spares``:
    pods that are ready; ``persist``: disagreements come again and again, be it at other steps."""
    accused = distinct(rank for each in found.accusations for rank in each.ranks)
    ranks = tuple(rank for rank in accused if rank in places)
    pods = tuple(places[rank].pod for rank in ranks)
    points = distinct(each.point for each in found.accusations)
    evidence = "; ".join(each.evidence for each in found.accusations)
    if before is None or before.nodes != nodes:
        fresh = Dispute(found.step, found.step, 1, points, ranks, pods, nodes, found.calibration, evidence)
        return fresh, "give up" if persist else "again"
    known = replace(
        before,
        step=found.step,
        seen=before.seen + 1,
        points=distinct((*before.points, *points)),
        ranks=ranks,
        pods=pods,
        evidence=evidence,
    )
    gone = _gone(known, places)
    tried = {each.slot for each in gone}
    # The leader's own pod comes last: another leader has to find its way first.
    left = sorted({rank // gpus_per_node for rank in ranks} - tried, key=lambda slot: (slot == 0, slot))
    if left and (spares or gone):  # who was put aside in vain has left a node that another one can go to
        return known, left[0]
    return known, "give up" if persist or gone or known.calibration else "again"


def _gone(dispute: Dispute, places: Mapping[int, Place]) -> tuple[Aside, ...]:
    """Who was put aside and is really away: a leader may be lost between the one and the other."""
    here = {place.pod for place in places.values()}
    return tuple(each for each in dispute.aside if each.pod not in here)
