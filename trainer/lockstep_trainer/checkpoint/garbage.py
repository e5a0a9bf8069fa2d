"""Deletes what nobody needs any more: old checkpoints, torn uploads, parts of uploads that never became objects.

Deleting races no writer: ``retention`` says what is dead, and a manifest goes before its files, so that a folder that
is half removed is no checkpoint. All functions block, and raise StoreError where the store fails; what is then left is
found again the next time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lockstep_api.messages import RestorePoint, StateId, Term
from lockstep_trainer.checkpoint import ancestors
from lockstep_trainer.checkpoint.chain import Chain, Latest
from lockstep_trainer.checkpoint.manifest import LATEST, MANIFEST, Manifest, parse_step_folder, step_folder
from lockstep_trainer.checkpoint.retention import Folder, Keep, Member, Store, disposable
from lockstep_trainer.errors import Corrupt, Superseded
from lockstep_trainer.storage import Entry

_POINTER_SECONDS = 24 * 3600.0
"""How long `latest` must have been something else before what it was is removed."""


@dataclass(frozen=True, slots=True)
class Contents:
    """A job's step folders: name → file → its entry."""

    folders: Mapping[str, Mapping[str, Entry]]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Contents:
        """Sorted out from a listing of ``step-``; what is no step folder's is left out."""
        folders: dict[str, dict[str, Entry]] = {}
        for entry in entries:
            name, _, file = entry.key.partition("/")
            if file and parse_step_folder(name):
                folders.setdefault(name, {})[file] = entry
        return cls(folders)

    def holds(self, manifest: Manifest) -> bool:
        """Whether each file that it names is there, as long as it says."""
        found = self.folders.get(manifest.folder, {})
        return all(file.name in found and found[file.name].size == file.size for file in manifest.files)

    def described(self) -> list[Folder]:
        """The folders as retention sees them."""
        states = {name: parse_step_folder(name) for name in self.folders}
        return [
            Folder(name, state, max(entry.modified for entry in self.folders[name].values()))
            for name, state in states.items()
            if state
        ]


@dataclass(frozen=True, slots=True)
class Removed:
    """What was deleted."""

    folders: tuple[str, ...] = ()
    uploads: int = 0  # unfinished ones that were given up
    pointers: int = 0  # earlier contents of `latest`, where the store keeps them


def collect_garbage(
    chain: Chain, keep: Keep, *, term: Term | None = None, now: float | None = None, grace: float = 600.0
) -> Removed:
    """Remove old checkpoints and dead leftovers. ``grace`` in seconds: what was touched since is left alone.

    A folder that a failure leaves half removed has no manifest any more, and goes when the next term has ``latest``.
    ``term`` is the caller's: it raises Superseded where a newer one has ``latest``, since that one decides now.
    """
    latest = chain.latest()
    if latest.pointer is None:
        return Removed()
    if term is not None and latest.pointer.term > term:
        raise Superseded(f"term {latest.pointer.term} has taken over: what is garbage is its to say")
    contents = Contents.of(chain.store.list("step-"))
    survey = _survey(chain, latest, contents, keep)
    store = Store(survey.members, latest.pointer.term, time.time() if now is None else now, grace)
    gone = disposable(contents.described(), store, keep)
    going = {folder.state for folder in gone}
    for state in survey.left_behind:  # before the state goes that shows it
        ancestors.unmark(chain.store, state)
    # Oldest first: where this is cut off, the rest still hangs together.
    for point in _behind_gaps(survey, going)[::-1]:
        ancestors.mark(chain.store, point)
    for folder in gone:
        remove_folder(chain, folder.name, contents)
    for state in survey.marks:
        if state in going or step_folder(state) not in contents.folders:
            ancestors.unmark(chain.store, state)
    pointers = chain.store.forget(LATEST, store.now - _POINTER_SECONDS)
    return Removed(tuple(folder.name for folder in gone), abort_uploads(chain, store), pointers)


def abort_uploads(chain: Chain, store: Store) -> int:
    """Give up uploads that nobody will finish, and return how many they were: those of states that are dead or durable,
    and small ones (of the journal, say) that have been under way for longer than the grace period."""
    count = 0
    for upload in chain.store.unfinished():
        state = parse_step_folder(upload.key.partition("/")[0])
        if store.over(state, upload.begun) if state else upload.begun < store.now - store.grace:
            chain.store.abort(upload)
            count += 1
    return count


def remove_folder(chain: Chain, name: str, contents: Contents) -> None:
    """Delete a step folder, its manifest first."""
    for file in sorted(contents.folders[name], key=lambda file: file != MANIFEST):
        chain.store.delete(f"{name}/{file}")


@dataclass(frozen=True, slots=True)
class _Survey:
    """The chain as far as retention must know it."""

    members: tuple[Member, ...]  # newest first
    points: Mapping[StateId, RestorePoint]  # of those whose manifests were asked for
    marks: tuple[StateId, ...]
    left_behind: tuple[StateId, ...]  # marks of states that are not on the chain any more


def _survey(chain: Chain, latest: Latest, contents: Contents, keep: Keep) -> _Survey:
    """Manifests are read as far as retention has not decided yet: behind a marked state beyond the window all that is
    left has marks, and those need no reading."""
    marks = ancestors.marked(chain.store)
    members: list[Member] = []
    points: dict[StateId, RestorePoint] = {}
    behind: StateId | None = None
    for point, manifest in chain.lineage(latest):
        if "://" in point.manifest:  # another job's
            break
        behind = point.state
        full = sum(member.whole for member in members) >= keep.last
        if full and point.state in marks and not _goes_on(manifest, marks, contents):
            break
        readable = isinstance(manifest, Manifest)
        members.append(Member(point.state, readable, isinstance(manifest, Manifest) and contents.holds(manifest)))
        points[point.state] = point
    for state in marks:
        if behind and state not in points and (state == behind or state.step < behind.step):
            members.append(Member(state, True, MANIFEST in contents.folders.get(step_folder(state), {})))
    on_chain = {member.state for member in members}
    in_sight = bool(members) and all(member.readable for member in members)
    left_behind = tuple(state for state in marks if in_sight and state not in on_chain)
    return _Survey(tuple(members), points, marks, left_behind)


def _goes_on(manifest: Manifest | Corrupt, marks: Sequence[StateId], contents: Contents) -> bool:
    """Whether a parent without a mark is still there: a removal was cut off."""
    parent = manifest.parent if isinstance(manifest, Manifest) else None
    return parent is not None and parent.state not in marks and step_folder(parent.state) in contents.folders


def _behind_gaps(survey: _Survey, going: set[StateId]) -> list[RestorePoint]:
    """The states that stay behind one that goes and have no mark yet, newest first."""
    gap, found = False, []
    for member in survey.members:
        if member.state in going:
            gap = True
        elif gap and member.state in survey.points and member.state not in survey.marks:
            found.append(survey.points[member.state])
    return found
