"""What Persist writes to a volume, and what is read back: as it was then, whatever has happened since."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter

from pydantic import TypeAdapter

from lockstep_trainer.protocol.leader import LeaderMemory
from lockstep_trainer.protocol.ledger import Ledger
from lockstep_trainer.protocol.node import NodeMemory
from lockstep_trainer.protocol.progress import Recovery
from lockstep_trainer.protocol.reports import Reports

_MEMORY: TypeAdapter[NodeMemory] = TypeAdapter(NodeMemory)
_LEADER = attrgetter(*LeaderMemory.__slots__)
_REPORTS = attrgetter(*Reports.__slots__)


class Written:
    """One write. ``coded``: as the agent's own JSON, else by copying what can still change, which is far cheaper."""

    __slots__ = ("_memory", "_text")

    def __init__(self, memory: NodeMemory, *, coded: bool) -> None:
        self._text = _MEMORY.dump_json(memory) if coded else None
        self._memory = None if coded else _apart(memory)

    def read(self) -> NodeMemory:
        """As it was."""
        if self._text is not None:
            return _MEMORY.validate_json(self._text)
        assert self._memory is not None
        return _apart(self._memory)  # an agent that reads it changes it; the next one reads it again


def _apart(memory: NodeMemory) -> NodeMemory:
    """With copies of the only three parts that are not frozen."""
    last = memory.leader
    if last is None:
        return memory
    fresh = LeaderMemory(*_LEADER(last))
    parts = (_reports(last.reports), _ledger(last.ledger), _recovery(last.recovery))
    for name, part in zip(("reports", "ledger", "recovery"), parts, strict=True):
        object.__setattr__(fresh, name, part)
    return NodeMemory(memory.member, fresh)


def _reports(known: Reports | None) -> Reports | None:
    if known is None:
        return None
    fresh = Reports(*_REPORTS(known))
    fresh.unacknowledged, fresh.judged, fresh.pace = [*known.unacknowledged], [*known.judged], [*known.pace]
    return fresh


def _ledger(known: Ledger | None) -> Ledger | None:
    if known is None:
        return None
    return Ledger(known.gpus, known.until, known.highest, known.phase, {**known.seconds})


def _recovery(known: Recovery | None) -> Recovery | None:
    return known and replace(known, sections={**known.sections})
