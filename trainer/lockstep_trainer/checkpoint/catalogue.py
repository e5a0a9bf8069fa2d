"""What lies in a store, for people: jobs, their checkpoints, leftovers; and how one is removed by hand.

Nothing here needs torch. All functions block; they raise StoreError where the store fails, Corrupt where ``latest``
itself can't be read, and UserError for what does not exist or must not go.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum

from lockstep_api.messages import RestorePoint, StateId
from lockstep_trainer.checkpoint import ancestors
from lockstep_trainer.checkpoint.chain import Chain
from lockstep_trainer.checkpoint.garbage import Contents, remove_folder
from lockstep_trainer.checkpoint.manifest import LATEST, MANIFEST, Manifest, parse_step_folder, step_folder
from lockstep_trainer.checkpoint.retention import Member, Store
from lockstep_trainer.errors import Corrupt, NotFound, UserError
from lockstep_trainer.storage import ObjectStore


class Place(StrEnum):
    """How a step folder stands to the chain."""

    CHAIN = "chain"
    """A reader finds it."""
    OPEN = "open"
    """Off the chain, but may come onto it: somebody may be writing it."""
    GARBAGE = "garbage"
    """Off the chain for good."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A step folder. ``point`` and ``manifest`` are there where its manifest is whole; ``problem`` says what is not.

    ``removed``: the chain still names it, but there is nothing of it; whoever removed it has left the chain as it was.
    """

    folder: str
    state: StateId
    place: Place
    size: int  # bytes of what is there
    modified: float  # Unix seconds: its newest file; 0 where nothing is there
    point: RestorePoint | None
    manifest: Manifest | None
    problem: str = ""
    removed: bool = False

    @property
    def whole(self) -> bool:
        """Whether every file is there, as long as it should be; what is in them is not looked at."""
        return self.manifest is not None and not self.problem


@dataclass(frozen=True, slots=True)
class Job:
    """The checkpoints of a job: the chain newest first, then what is off it by step."""

    chain: Chain
    checkpoints: tuple[Checkpoint, ...]
    known: Store

    @property
    def newest(self) -> Checkpoint | None:
        """The newest whole one."""
        return next((each for each in self.chained if each.whole), None)

    @property
    def chained(self) -> tuple[Checkpoint, ...]:
        """Those on the chain of which something is there, newest first."""
        return tuple(each for each in self.checkpoints if each.place == Place.CHAIN and not each.removed)

    def find(self, name: str) -> Checkpoint:
        """The one that ``name`` means: a step, or the name of a folder. Of several with a step the one on the chain."""
        found = [each for each in self.checkpoints if name in (each.folder, str(each.state.step))]
        chosen = [each for each in found if each.place == Place.CHAIN] or found
        if not chosen:
            has = ", ".join(str(each.state.step) for each in self.chained) or "none"
            raise UserError(f"{self.chain.store.uri}: no checkpoint {name}; it has {has}")
        if len(chosen) > 1:
            raise UserError(f"step {name} is ambiguous: name one of {', '.join(each.folder for each in chosen)}")
        return chosen[0]


def jobs(store: ObjectStore) -> tuple[str, ...]:
    """Prefixes of the jobs below ``store``: those of their ``latest``; "" for one that is right there. Folders that may
    not be read are passed over: above the jobs lies what others have, and at a volume's root lost+found."""
    prefixes = {entry.key.rpartition("/") for entry in store.list(readable=True)}
    return tuple(sorted(before for before, _, name in prefixes if name == LATEST))


def read_job(store: ObjectStore, *, now: float | None = None, grace: float = 600.0) -> Job:
    """All that is known of the job whose ``latest`` is in ``store``; raises UserError where there is none."""
    chain = Chain(store)
    latest = chain.latest()
    if latest.pointer is None:
        raise UserError(f"{store.uri}: no job's checkpoints are here; `lockstep checkpoint ls` shows where there are")
    contents = Contents.of(store.list("step-"))
    found = []
    for point, manifest in chain.lineage(latest, foreign=False):
        found.append(_on_chain(point, manifest, contents, store))
    members = tuple(Member(each.state, each.manifest is not None, each.whole) for each in found)
    known = Store(members, latest.pointer.term, time.time() if now is None else now, grace)
    on_chain = {each.state for each in found}
    for folder in sorted(contents.described(), key=lambda folder: (folder.state.step, folder.name)):
        if folder.state not in on_chain:
            place = Place.GARBAGE if known.dead(folder.state, folder.modified) else Place.OPEN
            size = sum(entry.size for entry in contents.folders[folder.name].values())
            found.append(Checkpoint(folder.name, folder.state, place, size, folder.modified, None, None))
    return Job(chain, tuple(found), known)


def remove(job: Job, chosen: Checkpoint, *, force: bool = False) -> None:
    """Delete one checkpoint. What is older on the chain stays in reach.

    Without ``force`` it raises UserError for the newest whole one, from which the job goes on, and for a folder that
    somebody may be writing.
    """
    newest = job.newest
    if chosen.place == Place.OPEN and not force:
        raise UserError(
            f"{chosen.folder} is off the chain, but may be being written; wait until the job has gone beyond it, or "
            "add --force where no job is running"
        )
    if newest and chosen.state == newest.state and not force:
        raise UserError(f"{chosen.folder} is the newest whole checkpoint: the job goes on from it; --force removes it")
    store = job.chain.store
    if chosen.place == Place.CHAIN:
        behind = [each for each in job.checkpoints if each.place == Place.CHAIN and each.state.step < chosen.state.step]
        for other in reversed(behind):
            if other.point:
                ancestors.mark(store, other.point)
    contents = Contents.of(store.list(f"{chosen.folder}/"))
    if chosen.folder in contents.folders:
        remove_folder(job.chain, chosen.folder, contents)
    ancestors.unmark(store, chosen.state)


def split(uri: str) -> tuple[str, str]:
    """A URI as the URI of a job, or of something above it, and the name of the step folder that it points at: "" where
    it ends before one. The folder's manifest means the folder."""
    root, _, last = uri.rstrip("/").removesuffix(f"/{MANIFEST}").rpartition("/")
    return (root, last) if parse_step_folder(last) else (uri, "")


def single(store: ObjectStore) -> ObjectStore:
    """The one job in or below ``store``; raises UserError where there is none, or more than one."""
    if _has_latest(store):
        return store
    found = jobs(store)
    if not found:
        raise UserError(nothing(store, "no checkpoints are below it; give checkpoint.uri of a job that has saved one"))
    if len(found) > 1:
        more = " …" if len(found) > 3 else ""
        raise UserError(f"{store.uri} holds {len(found)} jobs; name one of them: {', '.join(found[:3])}{more}")
    return store.below(found[0])


def nothing(store: ObjectStore, otherwise: str) -> str:
    """A sentence on a store without any ``latest``: ``otherwise``, unless step folders are there all the same."""
    found = []
    for entry in store.list(readable=True):
        before, _, name = entry.key.rpartition("/")
        state = parse_step_folder(before.rpartition("/")[2])
        if state is not None and name == MANIFEST:
            found.append((state.step, entry.modified, entry.key))
    if not found:
        return f"{store.uri}: {otherwise}"
    return (
        f"{store.uri}: step folders with a manifest are there ({len(found)}), but no `{LATEST}` that leads to one; "
        f"bring it back, or start another job with checkpoint.resumeFrom {store.uri}/{max(found)[-1]}"
    )


def _has_latest(store: ObjectStore) -> bool:
    try:
        store.get(LATEST)
    except NotFound:
        return False
    return True


def _on_chain(point: RestorePoint, manifest: Manifest | Corrupt, contents: Contents, store: ObjectStore) -> Checkpoint:
    name = step_folder(point.state)
    files = contents.folders.get(name, {})
    size = sum(entry.size for entry in files.values())
    modified = max((entry.modified for entry in files.values()), default=0.0)
    if isinstance(manifest, Corrupt):
        removed = not files
        problem = "removed" if removed else str(manifest).removeprefix(f"{store.uri}/{name}/")
        return Checkpoint(name, point.state, Place.CHAIN, size, modified, point, None, problem, removed)
    problem = ""
    if not contents.holds(manifest):
        wrong = next(
            file.name for file in manifest.files if file.name not in files or files[file.name].size != file.size
        )
        problem = f"{wrong} is {'missing' if wrong not in files else 'of another size than its manifest says'}"
    return Checkpoint(name, point.state, Place.CHAIN, size, modified, point, manifest, problem)
