"""Asks a worker where it is; see ``lockstep_trainer.position`` for the worker's side."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from lockstep_api.messages import GroupCalls, Position
from lockstep_trainer.position import POSITION, POSITION_SIGNAL, STACKS_SIGNAL
from lockstep_trainer.supervisor import read_json, stat_of

if TYPE_CHECKING:
    from lockstep_trainer.agent.worker import Worker

_PATIENCE_SECONDS = 1.0
_POLL_SECONDS = 0.02
_GROUPS: TypeAdapter[tuple[GroupCalls, ...]] = TypeAdapter(tuple[GroupCalls, ...])


async def examine(worker: Worker, *, listens: bool) -> Position:
    """Where the worker is. ``listens``: it is Lockstep's own and answers signals; others would die of them."""
    state = _process_state(worker)
    position = Position(worker.rank, worker.step, worker.section, state, answered=not listens)
    if not listens or worker.process is None or state in ("", "T", "t"):
        return position
    path = worker.folder / POSITION
    path.unlink(missing_ok=True)
    for number in (STACKS_SIGNAL, POSITION_SIGNAL):
        worker.process.signal(number)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (raw := read_json(path)) is None:
        if time.monotonic() > deadline:
            return position
        await asyncio.sleep(_POLL_SECONDS)
    try:
        groups = _GROUPS.validate_python(raw["groups"])
        frames, communicating = tuple(map(str, raw["frames"])), bool(raw["communicating"])
    except (KeyError, TypeError, ValidationError):
        return position
    return Position(worker.rank, worker.step, worker.section, state, True, frames, communicating, groups)


def _process_state(worker: Worker) -> str:
    """The letter in /proc; empty where there is no such process any more."""
    if worker.ended or worker.process is None or worker.process.gone:
        return ""
    try:
        return stat_of(worker.process.pid)[0]
    except OSError:
        return ""
