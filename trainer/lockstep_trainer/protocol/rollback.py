"""A rank that computes wrong numbers is put aside, and what it may have spoiled is left behind.

**Verified** is a state at step n of the lineage if some step k ≥ n on it was replayed and all units agreed at once. The
newest such k is the bound of a rollback: ``Keeping.agreed``. Rank 0 tells of it, each snapshot and manifest carries it
(``Listing.agreed``), so that a new leader knows it from what its workers restore, and retention keeps the newest state
that is not beyond it. A step that was rejected and agreed when it was computed again does not count: whoever was wrong
may have been wrong before.

A disagreement ends the generation. The bound becomes a **cut**: states beyond it that this or an older generation made
are not started from. Members write it down before they are quiet, whoever leads next learns it from them, and
``latest`` goes back behind it. Only then is the fault judged, and the culprit's pod given up: it may be the leader's
own. Where nobody can say who is wrong, ``dispute`` says whose pod is given up to find out, if any.

What verified does not promise is in ``docs/design/corruption.md``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lockstep_api.messages import Cut, Dispute, StateId
from lockstep_trainer.protocol import dispute
from lockstep_trainer.protocol.corruption import PERSISTENT, WINDOW
from lockstep_trainer.protocol.disagreement import Disagreement, culprit
from lockstep_trainer.protocol.effects import Effect, Persist
from lockstep_trainer.protocol.lineage import begun_from
from lockstep_trainer.protocol.policy import CORRUPTION, SUSPECTED
from lockstep_trainer.protocol.reports import places

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader


def heard(leader: Leader, line: dict[str, Any], now: float) -> list[Effect]:
    """A line of rank 0's about a replayed step; any other is passed over."""
    if leader.finished or leader.superseded or leader.last_start is None:
        return []  # over; or it is the last word of an older epoch's workers, whose ranks may have been others
    if line.get("kind") == "replayed" and isinstance(line.get("step"), int):
        return _agreed(leader, line["step"], now)
    found = Disagreement.read(line) if line.get("kind") == "corruption" else None
    if found is None or not leader.plan.rollback or leader.keeping.cuts(leader.term):
        return []  # the runs that follow say the same
    replays = leader.reports.replays
    who = culprit(found, places(leader))
    if who is not None:
        slot = who.ranks[0] // leader.plan.gpus_per_node
        return _go_back(leader, found, CORRUPTION, who.evidence, now, slot=slot, ranks=who.ranks)
    if found.calibration and (not leader.spares or replays.dispute or replays.excused):
        return []  # left out of the comparison: nothing could be found out, or it was
    return _doubted(leader, found, now)


def bound(agreed: int | None, begun: StateId | None, step: int) -> int:
    """The step beyond which nothing may be started from after a disagreement at ``step``; 0: only what the job began
    with. ``begun``: the state that the generation began from. Where no replay has ever agreed that one is taken, since
    nothing says of any older one that it is better."""
    first = begun.step if begun else 0
    return min(first if agreed is None else agreed, step - 1)


def _bound(leader: Leader, found: Disagreement) -> int:
    begun = begun_from(leader.last_start) if leader.last_start else None
    return bound(leader.keeping.agreed, begun, found.step)


def _agreed(leader: Leader, step: int, now: float) -> list[Effect]:
    """All units agreed on a step."""
    effects = leader.keeping.replayed(leader, step)
    return [*effects, *leader.reports.agreed(leader, step, now)] if leader.running else effects


def _doubted(leader: Leader, found: Disagreement, now: float) -> list[Effect]:
    """Nobody can say who is wrong."""
    plan, replays = leader.plan, leader.reports.replays
    known, answer = dispute.answer(
        replays.dispute,
        found,
        places(leader),
        nodes=plan.nodes,
        gpus_per_node=plan.gpus_per_node,
        spares=leader.spares,
        persist=replays.persist,
    )
    if answer == "give up" and not known.calibration:
        return _give_up(leader, found, known, now)
    if answer == "give up" and known.aside:
        known = replace(known, excused=True)
        why = f"{known.evidence}, whichever pods compute; from now on this is not compared"
        return _go_back(leader, found, SUSPECTED, why, now, ranks=known.ranks, known=known)
    if answer == "give up":
        why = f"{known.evidence}, and no spare is ready that could tell who is wrong; it is not compared"
        return _go_back(leader, found, SUSPECTED, why, now, ranks=known.ranks)
    why = f"{known.evidence}, and nobody can say who is wrong; it is made again"
    if answer == "again":
        return _go_back(leader, found, SUSPECTED, why, now, ranks=known.ranks, known=known)
    leader.reports.replays = replace(replays, doubts=())  # something is done about them
    known = dispute.without(known, answer, places(leader), plan.gpus_per_node)
    aside = known.aside[-1]
    why += f" without {aside.pod}"
    return _go_back(leader, found, SUSPECTED, why, now, slot=answer, ranks=aside.ranks, known=known)


def _go_back(
    leader: Leader,
    found: Disagreement,
    cause: str,
    why: str,
    now: float,
    *,
    slot: int | None = None,
    ranks: tuple[int, ...],
    known: Dispute | None = None,
) -> list[Effect]:
    """End the generation and cut off what it may have spoiled. ``slot``: whose pod is given up; ``known``: where it is
    not known that it should be."""
    last = _bound(leader, found)
    reason = f"{why} at step {found.step}; going back to a state that is not beyond step {last}"
    cut = Cut(leader.term, last, reason, known)
    leader.keeping.exclude(leader, cut)
    effects = leader.reports.rolled_back(leader, cut, ranks, now)
    suspect = replace(leader.suspect(cause, "arbiter", now, slot=slot), step=found.step, error=reason)
    if slot is not None:
        suspect = replace(suspect, rank=ranks[0], pod=leader.roster.members[slot].info.pod)
    if leader.running:
        return [*effects, *leader.fault(suspect, now)]
    # The generation ended for another reason a moment ago. Members are to write the cut down before the next one.
    leader.verdicts.accuse(suspect)
    for peer in leader.roster.members.values():
        peer.quiet = False
    return [*effects, *leader.roster.say_all(leader.abandon(cause), now), Persist()]


def _give_up(leader: Leader, found: Disagreement, known: Dispute, now: float) -> list[Effect]:
    if known.aside:
        pods = ", ".join(each.pod for each in known.aside)
        what = f"ranks disagree on step {found.step} also without {pods}: it is no GPU"
        remedy = "Check the program and its libraries"
    else:
        what = (
            f"ranks disagreed on {PERSISTENT} of at most {WINDOW} replayed steps and nobody can say who is wrong, the "
            f"last time at step {found.step}"
        )
        remedy = (
            "Check the nodes with `lockstep preflight`, train on three or more data-parallel ranks, so that two can "
            "outvote the third, or keep a spare ready (spec.spares), so that pods can be changed for it"
        )
    sentence = (
        f"{what}: {known.evidence}. {remedy}, or set resilience.corruption.action to Report. States beyond step "
        f"{_bound(leader, found)} are not verified"
    )
    suspect = replace(leader.suspect(CORRUPTION, "arbiter", now), step=found.step, error=sentence)
    return leader.fault(suspect, now)
