"""``ancestors/``: states that the chain goes on with behind a gap.

A manifest names its parent, and no more. Where retention removes a state but keeps an older one, nothing would lead
there any more; so before a state goes, each older one that stays gets a mark here, with the checksum of its manifest.
A mark is only made for a state that is on the chain, and is removed with it; one that the chain has left behind (a
rollback went to a state before it) is removed before the state that shows it is.
"""

from __future__ import annotations

from lockstep_api.messages import RestorePoint, StateId
from lockstep_trainer.checkpoint.manifest import Document, parse_step_folder, step_folder
from lockstep_trainer.errors import Corrupt, NotFound
from lockstep_trainer.storage import ObjectStore

FOLDER = "ancestors/"


class Mark(Document):
    """One state on the chain whose child is gone."""

    point: RestorePoint


def key(state: StateId) -> str:
    """The key of a state's mark."""
    return f"{FOLDER}{step_folder(state)}.json"


def marked(store: ObjectStore) -> tuple[StateId, ...]:
    """The states with a mark, those of the highest step first."""
    names = (entry.key.removeprefix(FOLDER).removesuffix(".json") for entry in store.list(FOLDER))
    states = {state for name in names if (state := parse_step_folder(name)) is not None}
    return tuple(sorted(states, key=_order, reverse=True))


def read(store: ObjectStore, state: StateId) -> RestorePoint | None:
    """The marked state; None where the mark is gone or can't be read."""
    try:
        return Mark.from_bytes(store.get(key(state))[0], key(state)).point
    except (NotFound, Corrupt):
        return None


def behind(store: ObjectStore, state: StateId) -> RestorePoint | None:
    """The newest marked state that ``state`` can descend from."""
    for other in marked(store):
        if other.step < state.step and _term(other) <= _term(state) and (point := read(store, other)):
            return point
    return None


def mark(store: ObjectStore, point: RestorePoint) -> None:
    """Remember that the chain goes on with ``point``."""
    store.put(key(point.state), Mark(point=point).to_bytes())


def unmark(store: ObjectStore, state: StateId) -> None:
    """Forget it. Not an error where there is no mark."""
    store.delete(key(state))


def _term(state: StateId) -> tuple[int, int]:
    return state.epoch, state.generation


def _order(state: StateId) -> tuple[int, int, int]:
    return state.step, state.epoch, state.generation
