"""What the leader does as time passes: is the generation alive, who is to be replaced, what is to be said again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lockstep_api.messages import Beat, Examine, ReplaceRequest
from lockstep_trainer.protocol.effects import Effect, SendOperator
from lockstep_trainer.protocol.hangs import Examination, blame
from lockstep_trainer.protocol.member import BEAT_SECONDS
from lockstep_trainer.protocol.progress import OUTAGE, UNBOUNDED_SECTIONS

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader

STALL_SECONDS = 2.0
"""A member without a stream, and no step for so long and two steps' time: enough for an agent to be started again."""
FINAL_SAVE_SECONDS = 60.0
"""How long the last state may stay away from all memories once all workers have ended well. Where a slot has lost what
it was to upload, nothing is waited for."""


def watch(leader: Leader, now: float) -> list[Effect]:
    """A generation runs: is it alive? A step needs all members, so steps prove that all are."""
    median = leader.median
    if missing := leader.roster.missing:
        # Two witnesses, a closed stream and no step when one is due: the generation is over, whoever comes back.
        # Between steps (an evaluation, say), and for a script, whose steps are not seen, the stream alone says it.
        sections = {peer.section for peer in leader.roster.members.values() if peer.connected}
        due = leader.plan.reports_steps and median is not None and not sections & (UNBOUNDED_SECTIONS | {OUTAGE})
        grace = STALL_SECONDS + 2 * (median or 0.0) if due else leader.plan.rejoin_grace
        since = max(min(peer.missing_since for peer in missing), leader.stepped_at)
        if now - since > grace:
            slot = min(peer.info.slot for peer in missing)
            return leader.fault(leader.suspect("MemberLost", "stream", now, slot=slot), now)
    if leader.done_at is not None:
        # Where the store is away the last state waits for it in memory, for as long as it takes.
        waited = now - leader.done_at > FINAL_SAVE_SECONDS
        lost = leader.keeping.last_is_gone() or (waited and leader.keeping.last_is_nowhere())
        if leader.plan.checkpoints and lost and not leader.durability.pending:
            suspect = leader.suspect("FinalCheckpointMissing", "progress", now)
            return leader.fault(replace(suspect, error=leader.keeping.problem(leader)), now)
        return []
    if leader.plan.reports_steps:
        sections = {peer.section for peer in leader.roster.members.values()}
        moved_at = max(peer.section_at for peer in leader.roster.members.values())
        bounds, stepped_at = leader.plan.hang, max(leader.started_at, leader.stepped_at)
        if now - stepped_at > bounds.allowed(median, sections) or now - moved_at > bounds.allowed_to_meet(sections):
            return _stuck(leader, now)
    leader.examination = None
    return []


def _stuck(leader: Leader, now: float) -> list[Effect]:
    """No step for too long: first ask where all workers are, then end the generation with what they say."""
    examination = leader.examination
    if examination is None or examination.stepped_at != leader.stepped_at:
        leader.examination = Examination(now, leader.stepped_at)
        return leader.roster.say_all(Examine(leader.plan.job_uid, leader.term), now)
    if not examination.over(leader.plan.nodes, now):
        return []
    positions = {position.rank: position for answer in examination.answers.values() for position in answer}
    found = blame(positions.values())
    rank = found.ranks[0] if found.ranks else None
    due = max(leader.started_at, leader.stepped_at) + (leader.median or 0.0)
    suspect = replace(
        leader.suspect("Hang", "progress", now, slot=None if rank is None else rank // leader.plan.gpus_per_node),
        at=min(now, due),
        rank=rank,
        error=found.sentence,
        log_tail=positions[rank].frames if rank is not None else (),
    )
    effects = leader.reports.hang(leader, found, positions.values(), now)
    return effects + leader.fault(suspect, now)


def wait(leader: Leader, now: float) -> list[Effect]:
    """Members that do not come back, or can't end their workers, are given up."""
    lost = leader.verdicts.missing(leader.roster, leader.formed_at, leader.plan.rejoin_grace, now)
    if not lost:
        return []
    cause, witness = lost[min(lost)]
    request = ReplaceRequest(leader.plan.job_uid, leader.epoch, tuple(sorted(lost)), cause, witness)
    return [SendOperator(request)]


def repeat(leader: Leader, now: float) -> list[Effect]:
    """Orders that seem not to have arrived, and a beat where there was nothing to say."""
    effects: list[Effect] = []
    roster, job_uid = leader.roster, leader.plan.job_uid
    for peer in roster.members.values():
        if not peer.connected or now - peer.said_at < BEAT_SECONDS:
            continue
        if leader.running and (peer.term is None or peer.term < leader.running.term):
            effects += roster.say(peer, leader.running, now)
        elif not leader.running and not leader.finished and not peer.quiet:
            effects += roster.say(peer, leader.abandon("again"), now)
        else:
            effects += roster.say(peer, Beat(job_uid, leader.term, peer.info.slot), now)
    for spare in roster.spares.values():
        if now - spare.said_at >= BEAT_SECONDS:
            effects += roster.say(spare, Beat(job_uid, leader.term, spare.info.slot), now)
    return effects
