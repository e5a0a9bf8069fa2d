"""The workers of one node: which generation they run, and who of them is at work, idle, or has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lockstep_api.messages import Start, StepSummary, Term, WorkerExited
from lockstep_trainer.protocol.events import WorkerEnded, WorkerIdle
from lockstep_trainer.protocol.policy import PEER_LOST_EXIT

RETAINED_STEPS = 64
"""Summaries kept for a leader that was away while steps went on."""
ABANDONED_EXIT = -9
"""How workers end that their agent kills."""


class NodeWorkers:
    """What a member knows of them. It decides what to do, and when they have all left their generation."""

    def __init__(self, running: Start | None, slot: int | None, step: int, now: float) -> None:
        """As they were when the agent before this one died, or anew."""
        self.running = running
        self.slot = slot
        """Whose ranks those of ``running`` are: an epoch of fewer nodes gives survivors other slots."""
        self.step = step
        """Newest one that they made."""
        self.live = set(self.ranks(running)) if running else set()
        self.resting: set[int] = set()
        """Ranks whose workers are idle. What an earlier agent left so its successor ends."""
        self.abandoning: Term | None = None
        """All up to this one are told to leave."""
        self.section = "starting"
        self.advanced_at = now
        self._abandoned_at = 0.0
        self._exits: dict[int, WorkerExited] = {}
        self.made_in: Term | None = running.term if running else None
        """The generation of the last steps, running or over."""
        self._recent: deque[StepSummary] = deque(maxlen=RETAINED_STEPS)

    def ranks(self, start: Start) -> range:
        """Global ranks of this node in that generation, its own newest one."""
        first = (self.slot or 0) * start.gpus_per_node
        return range(first, first + start.gpus_per_node)

    @property
    def exits(self) -> Sequence[WorkerExited]:
        """How those ended that the leader may not have heard of."""
        return tuple(self._exits.values())

    @property
    def recent(self) -> tuple[StepSummary, ...]:
        """The last steps of the generation."""
        return tuple(self._recent)

    def start(self, start: Start, slot: int, now: float) -> None:
        """All ranks of the slot are at work from now on."""
        self.running, self.slot, self.made_in = start, slot, start.term
        self.live = set(self.ranks(start))
        self.resting.clear()
        self._exits.clear()
        self._recent.clear()
        self.section = "starting"
        self.advanced_at = now

    def abandon(self, term: Term, now: float) -> None:
        """Those of generations up to ``term`` are to leave."""
        if self.abandoning is None:
            self._abandoned_at = now
        self.abandoning = term

    def quiesced(self) -> Term | None:
        """None is at work any more: the generation is over. What was abandoned, if they were told to leave."""
        term, self.abandoning, self.running = self.abandoning, None, None
        self._exits.clear()
        return term

    def at_work(self, term: Term, rank: int) -> bool:
        """Whether the rank is of that generation, and has neither ended nor left it."""
        return self.running is not None and term == self.running.term and rank in self.live

    def ended(self, event: WorkerEnded, job_uid: str, slot: int) -> WorkerExited | None:
        """One that was at work has ended; what the leader is to hear of it."""
        self.live.discard(event.rank)
        said = WorkerExited(
            job_uid=job_uid,
            term=event.term,
            slot=slot,
            rank=event.rank,
            exit_code=event.exit_code,
            error=event.error,
            user_error=event.user_error,
            log_tail=event.log_tail,
            at=event.at,
        )
        if self.abandoning is None:
            self._exits[event.rank] = said
            return said
        # What ended before we killed it may be the root of the fault: the leader wants to hear of it. Others may have
        # lost it, and we may have been told to leave, before it was reaped.
        killed = event.exit_code == ABANDONED_EXIT and event.ours
        own_end = event.at < self._abandoned_at or not (killed or event.exit_code == 0)
        return said if own_end else None

    def idle(self, event: WorkerIdle, job_uid: str, slot: int) -> WorkerExited | None:
        """One that was at work is out of its generation; what the leader is to hear of it.

        It was told to leave, or has lost a peer: that is a fault, and said as if it had ended by it.
        """
        self.live.discard(event.rank)
        self.resting.add(event.rank)
        if self.abandoning is not None:
            return None
        error = f"another worker went away: {event.error}"
        lost = WorkerExited(job_uid, event.term, slot, event.rank, PEER_LOST_EXIT, error, at=event.at)
        self._exits[event.rank] = lost
        return lost

    def stepped(self, done: Sequence[StepSummary], section: str, now: float) -> None:
        """They made these steps, maybe none, and are in that section of their loop."""
        self.section = section
        if done:
            self._recent.extend(done)
            self.step = max(self.step, done[-1].step)
            self.advanced_at = now
