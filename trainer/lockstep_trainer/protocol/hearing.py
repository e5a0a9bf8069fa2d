"""What the leader hears of its members: who has come, what their workers have done, what they say of snapshots."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lockstep_api.messages import (
    Beat,
    Examined,
    Injected,
    Join,
    Leaving,
    Quiesced,
    Staged,
    Steps,
    Uploaded,
    UploadProblem,
    WorkerExited,
)
from lockstep_trainer.protocol import events, rollback
from lockstep_trainer.protocol.effects import Effect
from lockstep_trainer.protocol.roster import Peer

if TYPE_CHECKING:
    from lockstep_trainer.protocol.leader import Leader


def member_connected(leader: Leader, event: events.MemberConnected, now: float) -> list[Effect]:
    """A stream with its Join: a member comes, comes back, or is not one."""
    peer, effects = leader.roster.join(event.connection, event.join, now)
    inventory = event.join.inventory
    if peer is None or inventory.slot is None or leader.finished or leader.superseded:
        return effects  # a stranger was sent away; a spare is only listened to
    leader.keeping.exclude(leader, event.join.cut)
    if leader.running is None:  # steps of a generation that goes on are still to be reported, and are no repetition
        leader.ledger.highest = max(leader.ledger.highest, inventory.step)
        if leader.recovery:
            leader.recovery.highest = max(leader.recovery.highest, inventory.step)
    if inventory.term > leader.term:
        return effects + leader.ask_for_epoch("a member has seen a newer generation: the leader's count is lost")
    if leader.running is None:
        peer.quiet = False
        if peer.container_restarted:  # its workers' peers were heard first, who only lost them
            leader.fault(leader.suspect("ContainerRestarted", "stream", now, slot=peer.info.slot), now)
        return effects + leader.roster.say(peer, leader.abandon("forming"), now)
    if inventory.running == leader.running.term:
        return effects
    if inventory.term < leader.running.term:
        return effects + leader.roster.say(peer, leader.running, now)
    cause = "ContainerRestarted" if inventory.container_starts > 1 else "AgentLost"
    return effects + leader.fault(leader.suspect(cause, "stream", now, slot=peer.info.slot), now)


def member_closed(leader: Leader, event: events.MemberClosed, now: float) -> list[Effect]:
    """A stream is gone; whether that means anything is seen later."""
    leader.roster.closed(event.connection, now)
    return []


def member_said(leader: Leader, event: events.MemberSaid, now: float) -> list[Effect]:
    """A message on a member's stream. What is of another generation than the newest is dropped."""
    message = event.message
    leader.roster.heard(event.connection, now)
    peer = leader.roster.member(event.connection)
    if peer is None or isinstance(message, Join) or message.job_uid != leader.plan.job_uid:
        return []
    if message.term.epoch != leader.epoch or message.slot != peer.info.slot:
        return []
    if isinstance(message, Quiesced):
        peer.origin, peer.snapshots, peer.resting = message.origin, message.snapshots, message.resting
        if leader.running is None and message.term >= leader.abandoned:
            peer.quiet = True
        return []
    peer.term = max(peer.term or message.term, message.term)
    if isinstance(message, Beat):
        return []
    if message.term != leader.term:  # older: here is ours
        return leader.roster.say(peer, Beat(leader.plan.job_uid, leader.term, peer.info.slot), now)
    if leader.finished or leader.superseded:
        return []
    match message:
        case Steps():
            return _member_stepped(leader, peer, message, now)
        case WorkerExited():
            return _worker_exited(leader, peer, message, now)
        case Staged():
            return leader.keeping.staged(leader, peer, message, now)
        case Uploaded():
            return leader.keeping.uploaded(leader, peer, message, now)
        case UploadProblem():
            return leader.keeping.failed(leader, message, now)
        case Examined():
            if leader.examination:
                leader.examination.answers[message.slot] = message.positions
            return []
        case Injected():
            return leader.reports.injected_there(leader, message, now)
        case Leaving():
            return leader.keeping.leaving(leader, message, now)


def _member_stepped(leader: Leader, peer: Peer, message: Steps, now: float) -> list[Effect]:
    if leader.running is None:  # made before the generation was given up, and it may go on from there
        return leader.reports.late(leader, leader.steps.add(peer.info.slot, message.done), now)
    if message.section != peer.section:
        peer.section, peer.section_at = message.section, now
    if leader.recovery:
        leader.recovery.section(peer.info.slot, message.section, now)
    leader.slow.heard(message.work)
    finished = leader.steps.add(peer.info.slot, message.done)
    effects: list[Effect] = []
    if message.done:
        leader.stepped_at = now
        effects += leader.keeping.stepped(leader, message.done[0].step, now)
        if leader.running is None:  # begun from what is not the newest
            return [*effects, *leader.reports.late(leader, finished, now)]
    if not finished:
        return effects
    return [*effects, *leader.reports.steps(leader, finished, now), *leader.slow.stepped(leader, finished, now)]


def _worker_exited(leader: Leader, peer: Peer, message: WorkerExited, now: float) -> list[Effect]:
    if message.exit_code == 0 and leader.running:
        peer.exits[message.rank] = 0
        if all(len(other.exits) == leader.plan.gpus_per_node for other in leader.roster.members.values()):
            leader.done_at = now
            return leader.finish(now)
        return []
    if message.exit_code == 0:
        return []
    suspect = replace(
        leader.suspect("WorkerExited", "exit", now, slot=message.slot),
        at=min(message.at or now, now),
        rank=message.rank,
        exit_code=message.exit_code,
        error=message.error,
        user_error=message.user_error,
        log_tail=message.log_tail,
    )
    return leader.fault(suspect, now)


def worker_reported(leader: Leader, event: events.WorkerReported, now: float) -> list[Effect]:
    """A line of rank 0's."""
    effects: list[Effect] = []
    if event.line.get("kind") == "restore":
        if leader.recovery:
            leader.recovery.source = str(event.line.get("source") or "")
        effects = leader.keeping.restored(leader, event.line, now)
    effects += leader.reports.worker_reported(leader, event.line, now)
    return [*effects, *rollback.heard(leader, event.line, now)]


def invite_refused(leader: Leader, event: events.InviteRefused, now: float) -> list[Effect]:
    """Whoever answers at the address is not the member: its node was rebooted, or the address has a new owner."""
    peer = leader.roster.members.get(event.slot)
    if peer is None or peer.connected or leader.finished or event.inventory.job_uid != leader.plan.job_uid:
        return []
    if event.inventory.term.epoch > leader.epoch:
        leader.superseded = True
        return []
    if not peer.is_me(event.inventory):
        leader.verdicts.condemned[event.slot] = ("MemberLost", "stream")
        return leader.fault(leader.suspect("MemberLost", "stream", now, slot=event.slot), now)
    return []
