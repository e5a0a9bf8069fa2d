"""Which step folders are superfluous. A pure function: it decides, ``chain`` deletes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lockstep_api.messages import StateId, Term


@dataclass(frozen=True, slots=True)
class Folder:
    """A step folder in the store."""

    name: str
    state: StateId
    modified: float  # Unix seconds: its newest file


def disposable(
    folders: Iterable[Folder],
    chain: Sequence[tuple[StateId, bool]],
    fence: Term,
    keep_last: int,
    *,
    now: float,
    grace: float,
) -> tuple[str, ...]:
    """Names of the folders to remove, sorted.

    ``chain`` is the lineage, newest first, each with whether its manifest is whole. On it the newest ``keep_last``
    whole ones stay (so the last whole one always does) and everything newer than the oldest of them. Off it goes what
    a term before ``fence`` left behind and nobody has touched for ``grace`` seconds: its writers are over. While a
    manifest of the chain can't be read, nothing off the chain goes: it may be the part that is out of sight.
    """
    keep: set[StateId] = set()
    whole = 0
    for state, is_whole in chain:
        if whole >= keep_last:
            break
        keep.add(state)
        whole += is_whole
    on_chain = {state for state, _ in chain}
    all_whole = all(is_whole for _, is_whole in chain)
    names = []
    for folder in folders:
        if folder.state in on_chain:
            gone = folder.state not in keep
        else:
            over = Term(folder.state.epoch, folder.state.generation) < fence
            gone = over and all_whole and folder.modified < now - grace
        if gone:
            names.append(folder.name)
    return tuple(sorted(names))
