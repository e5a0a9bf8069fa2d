"""A rank that computes wrong numbers is put aside, and what it may have spoiled is left behind.

**Verified** is a state at step n of the lineage if some step k ≥ n on it was replayed and all units agreed at once. The
newest such k is the bound of a rollback: ``Keeping.agreed``. Rank 0 tells of it, each snapshot and manifest carries it
(``Listing.agreed``), so that a new leader knows it from what its workers restore, and retention keeps the newest state
that is not beyond it. A step that was rejected and agreed when it was computed again does not count: whoever was wrong
may have been wrong before.

A disagreement with a culprit ends the generation. The bound becomes a **cut**: states beyond it that this or an older
generation made are not started from. Members write it down before they are quiet, whoever leads next learns it from
them, and ``latest`` goes back behind it. Only then is the fault judged, and the culprit's pod given up: it may be the
leader's own.

What verified does not promise is in ``docs/design/corruption.md``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lockstep_api.messages import Cut, StateId
from lockstep_trainer.protocol.corruption import PERSISTENT, WINDOW, Accusation, Disagreement, culprit
from lockstep_trainer.protocol.effects import Effect, Persist
from lockstep_trainer.protocol.lineage import begun_from
from lockstep_trainer.protocol.policy import CORRUPTION
from lockstep_trainer.protocol.reports import places

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader


def heard(leader: Leader, line: dict[str, Any], now: float) -> list[Effect]:
    """A line of rank 0's about a replayed step; any other is passed over."""
    if leader.finished or leader.superseded or leader.last_start is None:
        return []  # over; or it is the last word of an older epoch's workers, whose ranks may have been others
    if line.get("kind") == "replayed" and isinstance(line.get("step"), int):
        return leader.keeping.replayed(leader, line["step"])
    found = Disagreement.read(line) if line.get("kind") == "corruption" else None
    if found is None or not leader.plan.rollback or leader.keeping.cuts(leader.term):
        return []  # the runs that follow say the same
    who = culprit(found, places(leader))
    if who is not None:
        return _put_aside(leader, found, who, now)
    return _give_up(leader, found, now) if leader.reports.replays.persist else []


def bound(agreed: int | None, begun: StateId | None, step: int) -> int:
    """The step beyond which nothing may be started from after a disagreement at ``step``; 0: only what the job began
    with. ``begun``: the state that the generation began from. Where no replay has ever agreed that one is taken, since
    nothing says of any older one that it is better."""
    first = begun.step if begun else 0
    return min(first if agreed is None else agreed, step - 1)


def _bound(leader: Leader, found: Disagreement) -> int:
    begun = begun_from(leader.last_start) if leader.last_start else None
    return bound(leader.keeping.agreed, begun, found.step)


def _put_aside(leader: Leader, found: Disagreement, who: Accusation, now: float) -> list[Effect]:
    slot = who.ranks[0] // leader.plan.gpus_per_node
    last = _bound(leader, found)
    reason = f"{who.evidence} at step {found.step}; going back to a state that is not beyond step {last}"
    cut = Cut(leader.term, last, reason)
    leader.keeping.exclude(leader, cut)
    effects = leader.reports.rolled_back(leader, cut, who.ranks, now)
    suspect = replace(
        leader.suspect(CORRUPTION, "arbiter", now, slot=slot),
        rank=who.ranks[0],
        step=found.step,
        error=reason,
        pod=leader.roster.members[slot].info.pod,
    )
    if leader.running:
        return [*effects, *leader.fault(suspect, now)]
    # The generation ended for another reason a moment ago. Members are to write the cut down before the next one.
    leader.verdicts.suspects.append(suspect)
    for peer in leader.roster.members.values():
        peer.quiet = False
    return [*effects, *leader.roster.say_all(leader.abandon(CORRUPTION), now), Persist()]


def _give_up(leader: Leader, found: Disagreement, now: float) -> list[Effect]:
    evidence = "; ".join(one.evidence for one in found.accusations)
    sentence = (
        f"ranks disagreed on {PERSISTENT} of at most {WINDOW} replayed steps and nobody can say who is wrong, the last "
        f"time at step {found.step}: {evidence}. Check the nodes with `lockstep preflight`, train on three or more "
        "data-parallel ranks, so that two can outvote the third, or set resilience.corruption.action to Report. States "
        f"beyond step {_bound(leader, found)} are not verified"
    )
    suspect = replace(leader.suspect(CORRUPTION, "arbiter", now), step=found.step, error=sentence)
    return leader.fault(suspect, now)
