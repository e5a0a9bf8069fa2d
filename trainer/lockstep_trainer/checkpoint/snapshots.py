"""Snapshots in the memory-backed volume, as everybody sees them who reads one: agents, and workers that start again.

A snapshot of a rank is a buffer and the JSON beside it, which is there only while the buffer is whole. Readers hold a
shared lock on the buffer as long as they read; whoever writes one holds it exclusively from before the JSON goes until
the new one is there. A death lets go. No torch here.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from lockstep_api.messages import RestorePoint, StateId, Term
from lockstep_api.wire import KEYS_ONLY
from lockstep_trainer.checkpoint.plan import Plan
from lockstep_trainer.errors import CheckpointError, Corrupt
from lockstep_trainer.supervisor import read_json, write_json

FOLDER = "snapshots"
BUDDIES = "buddies"
UPLOADING = "uploading.json"
"""In the folder ``snapshots``: the state that the agent brings to the store."""
BUFFERS = 3
"""Of a rank: one that is kept, one that is on its way to be, and one to write."""
COPIES = 2
"""Of a rank of another pod: one that is kept, and one that comes."""


class NoSnapshotError(CheckpointError):
    """The volume does not hold this snapshot."""


class SnapshotBusyError(NoSnapshotError):
    """Its writer has not let go of it yet, or is about to overwrite it: whoever asks again will know."""


@dataclass(frozen=True, slots=True)
class Root:
    """Where the sample log of a snapshot begins to be this run's own: the term that last restored from the store, and
    what it restored. Another point of an older term is not what the state descends from, whoever says so."""

    term: Term
    point: RestorePoint | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``buffer-<n>.json``."""

    state: StateId
    plan: str  # key of the plan
    crc64nvme: tuple[str, ...]  # of each item of the plan
    header: dict[str, Any]  # the manifest without files and parent
    root: Root
    since: int  # step that the sample log begins behind
    samples: str | None  # name of the sample log in the step folder; None: another rank keeps it
    at: float  # Unix seconds
    blocked: float  # seconds that training stood still
    copied: float  # seconds that the copy took
    left_out: int = 0  # snapshots of this generation, up to this one, for which there was no free buffer

    def to_json(self) -> dict[str, Any]:
        """For ``write_json``."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where there is none, or none that this version can read."""
        try:
            found: Self | None = _SNAPSHOT.validate_json(path.read_bytes())  # type: ignore[assignment]
        except (OSError, ValidationError):
            return None
        return found


_SNAPSHOT: TypeAdapter[Snapshot | None] = TypeAdapter(Snapshot | None, config=KEYS_ONLY)
"""«Or none» since pydantic takes no settings for a dataclass alone."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A snapshot that is held by a shared lock."""

    snapshot: Snapshot
    plan: Plan
    data: memoryview
    folder: Path
    number: int

    @property
    def metadata(self) -> Path:
        """``.metadata`` of the step folder, where the plan says that this rank has it."""
        return self.folder / f"metadata-{self.plan.key}"

    @property
    def samples(self) -> Path:
        """The sample log."""
        return self.folder / f"samples-{self.number}.jsonl"

    @property
    def buffer(self) -> Path:
        """The bytes."""
        return self.folder / f"buffer-{self.number}"


def order(state: StateId) -> tuple[int, int, int]:
    """States of one lineage in the order in which they came to be."""
    return state.epoch, state.generation, state.step


def rank_folder(root: Path, rank: int) -> Path:
    """``root``: ``snapshots`` or ``snapshots/buddies``."""
    return root / f"r{rank}"


def ranks_in(root: Path) -> list[int]:
    """Ranks that have a folder in ``root``."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(int(name[1:]) for name in names if name[:1] == "r" and name[1:].isdecimal())


def numbers_in(folder: Path) -> list[int]:
    """Numbers of the buffers in a rank's folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(name[7:]) for name in names if name.startswith("buffer-") and name[7:].isdecimal())


def held(folder: Path) -> dict[int, Snapshot]:
    """Whole snapshots of a rank, by the number of the buffer."""
    found = {number: Snapshot.read(json_of(folder, number)) for number in numbers_in(folder)}
    return {number: snapshot for number, snapshot in found.items() if snapshot is not None}


def json_of(folder: Path, number: int) -> Path:
    """The JSON beside a buffer."""
    return folder / f"buffer-{number}.json"


@contextmanager
def reading(folder: Path, state: StateId, *, wait: bool = False) -> Iterator[Reading]:
    """Hold the rank's snapshot of ``state`` against being overwritten. ``wait``: until its writer has let go of it.

    Raises NoSnapshotError where there is none, SnapshotBusyError where that can't be known without waiting, Corrupt
    where its plan is gone or the buffer too short.
    """
    busy = False
    for number, snapshot in held(folder).items():
        if snapshot.state != state:
            continue
        descriptor = os.open(folder / f"buffer-{number}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not lock(descriptor, shared=True, wait=wait):
                busy = True
                continue
            again = Snapshot.read(json_of(folder, number))
            if again is None or again.state != state:
                continue
            plan = read_plan(folder, again.plan)
            if os.fstat(descriptor).st_size < plan.size or len(again.crc64nvme) != len(plan.items):
                raise Corrupt(f"{folder}/buffer-{number} is not what its plan says")
            # A private mapping: torch wants memory that it could write to.
            memory = mmap.mmap(descriptor, plan.size, access=mmap.ACCESS_COPY)
            yield Reading(again, plan, memoryview(memory), folder, number)
            return
        finally:
            # The mapping has a descriptor of its own, and goes when the last view of it does: an error that is on its
            # way up may still hold one. The lock goes now.
            unlock(descriptor)
            os.close(descriptor)
    named = f"step {state.step} ({state.epoch}/{state.generation})"
    if busy:
        raise SnapshotBusyError(f"{folder}: the buffer with the snapshot of {named} is being written")
    raise NoSnapshotError(f"{folder} has no snapshot of {named}")


def read_plan(folder: Path, key: str) -> Plan:
    """Raises Corrupt where it is gone or is another."""
    path = folder / f"plan-{key}.json"
    try:
        plan = Plan.from_json(path.read_text(), str(path))
    except OSError as error:
        raise Corrupt(f"{path} can't be read: {error.strerror}") from None
    if plan.key != key:
        raise Corrupt(f"{path} differs from its checksum")
    return plan


def lock(descriptor: int, *, shared: bool, wait: bool = False) -> bool:
    """Lock; without ``wait`` at once or not at all: False where others hold it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_busy(folder: Path) -> bool:
    """Whether somebody reads or writes a buffer of the rank at the moment."""
    for number in numbers_in(folder):
        with suppress(FileNotFoundError):
            descriptor = os.open(folder / f"buffer-{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not lock(descriptor, shared=False):
                    return True
            finally:
                os.close(descriptor)
    return False


def unlock(descriptor: int) -> None:
    """Give the lock back."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


# --- what the agent tells its workers ---------------------------------------------------------------------------------


def write_state(path: Path, state: StateId | None) -> None:
    """``kept.json``, ``durable.json`` and their like; None removes it."""
    if state is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"state": asdict(state)})


def read_state(path: Path) -> StateId | None:
    """None where nothing was said yet."""
    raw = read_json(path)
    return state_of(raw["state"]) if raw else None


def state_of(raw: Mapping[str, int]) -> StateId:
    """The state in a JSON object."""
    return StateId(raw["step"], raw["epoch"], raw["generation"])


def real_parent(ordered: RestorePoint | None, root: Root) -> RestorePoint | None:
    """What a snapshot descends from. ``ordered`` is the newest durable state by the leader's count; where the ranks
    restored something older than they were told to (a corrupt checkpoint's parent), only ``root`` knows."""
    if ordered is None or "://" in ordered.manifest:
        return root.point
    made = Term(ordered.state.epoch, ordered.state.generation)
    return ordered if made >= root.term else root.point


def drop_beyond(root: Path, term: Term, step: int) -> list[StateId]:
    """Forget the snapshots in ``root`` (``snapshots`` or ``snapshots/buddies``) that are beyond ``step`` and older than
    ``term``; returns their states."""
    dropped = []
    for rank in ranks_in(root):
        folder = rank_folder(root, rank)
        for number, snapshot in held(folder).items():
            state = snapshot.state
            if state.step > step and Term(state.epoch, state.generation) < term:
                json_of(folder, number).unlink(missing_ok=True)
                dropped.append(state)
    return dropped


def sample_lines(text: str, beyond: int) -> str:
    """The lines of a sample log of steps beyond ``beyond``."""
    return "".join(f"{line}\n" for line in text.splitlines() if line and json.loads(line)["step"] > beyond)
