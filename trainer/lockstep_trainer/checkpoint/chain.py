"""The chain of durable checkpoints of one job, as its leader keeps it.

``latest`` names a manifest, that its parent, and so on: what is not on this chain does not exist. All methods block
and may be called from a thread; they raise StoreError where the store fails, with ``temporary`` set where the same call
may succeed later.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import assert_never

from lockstep_api.messages import Cut, RestorePoint, Term
from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.checkpoint import ancestors
from lockstep_trainer.checkpoint import commit as swap_protocol
from lockstep_trainer.checkpoint.manifest import (
    ANCESTORS,
    LATEST,
    MANIFEST,
    Listing,
    Manifest,
    Pointer,
)
from lockstep_trainer.errors import (
    CheckpointError,
    Conflict,
    Corrupt,
    NotFenced,
    NotFound,
    PreconditionFailed,
    StoreError,
    Superseded,
    UserError,
)
from lockstep_trainer.protocol.lineage import is_cut_off
from lockstep_trainer.storage import ObjectStore, open_store
from lockstep_trainer.storage.probe import probe

log = logging.getLogger(__name__)

_MOVES = 8  # times that `latest` may be swapped under us before we say that something is wrong


@dataclass(frozen=True, slots=True)
class Latest:
    """``latest`` as it was read."""

    pointer: Pointer | None
    etag: str | None

    @property
    def point(self) -> RestorePoint | None:
        """The state that it names."""
        return self.pointer.point if self.pointer else None

    @property
    def named(self) -> tuple[RestorePoint, ...]:
        """That state and the older ones that it names too."""
        if self.pointer is None or self.pointer.point is None:
            return ()
        return (self.pointer.point, *self.pointer.ancestors)

    def behind(self, point: RestorePoint | None) -> tuple[RestorePoint, ...]:
        """The named states that are older than ``point``."""
        return self.named[self.named.index(point) + 1 :] if point in self.named else ()


class Chain:
    """Durable checkpoints of one job: read, fence, commit. ``garbage`` clears away."""

    def __init__(
        self,
        store: ObjectStore,
        prefix: str = "",
        *,
        s3: S3Spec | None = None,
        resume_from: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``store`` rooted at ``checkpoint.uri``; ``prefix`` is ``<namespace>/<job>/<uid>``.

        ``resume_from`` is the URI of the manifest from which a job without a checkpoint of its own begins; ``s3`` is
        how stores of other jobs are reached.
        """
        self.store = store.below(prefix) if prefix else store
        self._s3 = s3
        self._resume_from = resume_from
        self._origin: RestorePoint | None = None
        self._sleep = sleep
        self.problems: list[str] = []
        """Corrupt manifests met so far, a sentence each. They are passed over, never repaired."""

    # --- reading ------------------------------------------------------------------------------------------------

    def latest(self) -> Latest:
        """``latest`` as it is now. Raises Corrupt where it can't be read."""
        try:
            data, etag = self.store.get(LATEST)
        except NotFound:
            return Latest(None, None)
        return Latest(Pointer.from_bytes(data, f"{self.store.uri}/{LATEST}"), etag)

    def manifest(self, point: RestorePoint) -> Manifest:
        """The manifest that ``point`` names; raises Corrupt where it is gone or its checksum differs."""
        return read_manifest(self.store, point, self._s3)

    def newest(self) -> RestorePoint | None:
        """The newest state whose manifest is whole, on the chain; None for a job without any checkpoint."""
        return self._newest(self.latest())

    def lineage(self, latest: Latest, *, foreign: bool = True) -> Iterator[tuple[RestorePoint, Manifest | Corrupt]]:
        """The newest state, its parent, its parent's parent … with their manifests, as far as they are kept.

        Behind a manifest that can't be read it goes on with the ancestors that ``latest`` names, and where retention
        has removed a state with the newest marked one (``ancestors``). Ends at the first checkpoint or at one of
        another job; unless ``foreign`` before that one, whose store need not be open to the reader.
        """
        point = latest.point
        seen: set[str] = set()
        while point is not None and point.manifest not in seen:
            if "://" in point.manifest and not foreign:
                return
            seen.add(point.manifest)
            manifest = self._read(point)
            yield point, manifest
            if "://" in point.manifest:
                return
            if isinstance(manifest, Corrupt):
                point = next(iter(latest.behind(point)), None) or ancestors.behind(self.store, point.state)
            elif (parent := manifest.parent) is None:
                return
            elif "://" in parent.manifest or self._exists(parent.manifest):
                point = parent
            else:  # retention has removed it
                point = ancestors.behind(self.store, point.state)

    def older(self, point: RestorePoint) -> RestorePoint | None:
        """The state behind ``point`` on the chain, whether its own manifest can be read or not; None where it is the
        first, or not on this chain. Raises Corrupt where ``latest`` can't be read."""
        lineage = (each for each, _ in self.lineage(self.latest()))
        return next(lineage, None) if point in lineage else None

    # --- writing ------------------------------------------------------------------------------------------------

    def fence(
        self, term: Term, nonce: str, cut: Cut | None = None, at: RestorePoint | None = None
    ) -> RestorePoint | None:
        """Take ``latest`` for ``term`` and return the state that this term descends from.

        From here on no older term can commit. Where the newest manifest is corrupt, or ``cut`` excludes it, ``latest``
        moves back to the newest whole one that may be used; where there is none, to where the job began. It moves back
        to ``at``, where it leads to that: what came behind it is on no lineage. A job's first fence probes the store.
        Raises Superseded where a newer term has ``latest``, UserError where the job began from a manifest that is gone
        and has nothing else.
        """
        latest = self.latest()
        if latest.pointer is None:
            probe(self.store)
        for _ in range(_MOVES):
            if latest.pointer and latest.pointer.term > term:
                raise Superseded(_superseded(term, latest.pointer))
            target = self._newest(latest, cut, at if at in latest.named else None)
            moved = self._swap(latest, self._pointer(latest, term, nonce, target, latest.behind(target)))
            if moved is None:
                return target
            latest = moved
        raise CheckpointError(f"{self.store.uri}/{LATEST} is swapped again and again: is this job led twice?")

    def commit(self, listing: Listing, term: Term, nonce: str) -> RestorePoint:
        """Make the step folder that ``listing`` describes the newest state.

        Calling it again with the same listing is harmless. Raises NotFenced or Superseded where ``latest`` is not this
        epoch's, CheckpointError where the state does not descend from it.
        """
        latest = self.latest()
        for _ in range(_MOVES):
            if latest.pointer is None or latest.pointer.epoch < term.epoch:
                raise NotFenced(f"{self.store.uri}/{LATEST} is not fenced for epoch {term.epoch}")
            if latest.pointer.term > term:
                raise Superseded(_superseded(term, latest.pointer))
            done = next((point for point in latest.named if point.state == listing.state), None)
            if done is not None:
                return done
            self._check_descent(listing, term, latest)
            point = self._put_manifest(listing)
            ancestors = (listing.parent, *latest.behind(listing.parent)) if listing.parent else ()
            moved = self._swap(latest, self._pointer(latest, term, nonce, point, ancestors))
            if moved is None:
                return point
            latest = moved
        raise CheckpointError(f"{self.store.uri}/{LATEST} is swapped again and again: is this job led twice?")

    # ------------------------------------------------------------------------------------------------------------

    def _newest(self, latest: Latest, cut: Cut | None = None, at: RestorePoint | None = None) -> RestorePoint | None:
        """The newest whole state that ``latest`` leads to and ``cut`` allows, and that is not newer than ``at``."""
        if latest.point is None:
            return self._beginning()
        passed = unreadable = False
        for point, manifest in self.lineage(latest):
            if is_cut_off(point, cut) or (at is not None and point.state.step > at.state.step):
                passed = True
            elif isinstance(manifest, Manifest):
                return point
            else:
                unreadable = True
                self._report(str(manifest))
        if passed and not unreadable:
            return self._beginning()
        raise Corrupt(
            f"{self.store.uri}: no checkpoint can be read ({self.problems[-1]}); "
            "restore the files from a backup, or start another job with checkpoint.resumeFrom"
        )

    def _beginning(self) -> RestorePoint | None:
        """Where the job begins. Looked for only where it has nothing of its own: the other job may have removed it
        since. Raises UserError then."""
        if self._origin is None and self._resume_from:
            self._origin = resolve(self._resume_from, self._s3)
        return self._origin

    def _read(self, point: RestorePoint) -> Manifest | Corrupt:
        try:
            return self.manifest(point)
        except Corrupt as error:
            return error

    def _check_descent(self, listing: Listing, term: Term, latest: Latest) -> None:
        """Uploads outlive the generation whose workers staged the state, and its epoch: a newer term may commit it, as
        long as nothing newer than it is on the chain."""
        made = Term(listing.state.epoch, listing.state.generation)
        if made > term:
            raise CheckpointError(f"{listing.folder} was written by a newer term than {_text(term)}: not committed")
        own = [point.state for point in latest.named[:1] if "://" not in point.manifest]
        if any((made, listing.state.step) < (Term(state.epoch, state.generation), state.step) for state in own):
            raise CheckpointError(f"{listing.folder} is older than {own[0]}, which is durable: not committed")
        if listing.parent == latest.point or listing.parent in latest.named:
            return
        lineage = [point for point, _ in self.lineage(latest)]
        # Not the newest: the upload was ordered before that was committed, or the ranks found its files corrupt and
        # restored another.
        if listing.parent in lineage:
            return
        # Fresh weights: right as long as the chain holds nothing but the same generation's states.
        fresh = all(Term(point.state.epoch, point.state.generation) == made for point in lineage)
        if listing.parent is None and fresh:
            return
        raise CheckpointError(
            f"{listing.folder} descends from {listing.parent.manifest if listing.parent else 'fresh weights'}, not "
            f"from the chain of {latest.point.manifest if latest.point else 'this job'}: not committed"
        )

    def _put_manifest(self, listing: Listing) -> RestorePoint:
        manifest = Manifest.model_validate(listing.model_dump())
        point = manifest.point()
        try:
            self.store.put(point.manifest, manifest.to_bytes(), only_if_absent=True)
        except PreconditionFailed:
            # An earlier try of the same commit; its bytes are a function of the listing.
            data, _ = self.store.get(point.manifest)
            if data != manifest.to_bytes():
                raise CheckpointError(
                    f"{self.store.uri}/{point.manifest} exists and names other files: not committed"
                ) from None
        return point

    def _pointer(
        self, latest: Latest, term: Term, nonce: str, point: RestorePoint | None, ancestors: tuple[RestorePoint, ...]
    ) -> Pointer:
        return Pointer(
            sequence=(latest.pointer.sequence if latest.pointer else 0) + 1,
            epoch=term.epoch,
            generation=term.generation,
            nonce=nonce,
            point=point,
            ancestors=ancestors[:ANCESTORS],
        )

    def _swap(self, latest: Latest, pointer: Pointer) -> Latest | None:
        """Swap ``latest``; None where it worked, its new value where somebody else has moved it."""
        state, effect = swap_protocol.begin(pointer, latest.etag)
        problem: StoreError | None = None
        while True:
            match effect:
                case swap_protocol.Done():
                    return None
                case swap_protocol.Moved(current, etag):
                    return Latest(current, etag)
                case swap_protocol.Lost(current):
                    raise Superseded(_superseded(pointer.term, current))
                case swap_protocol.GaveUp():
                    raise StoreError(f"{self.store.uri}/{LATEST} can't be swapped: {problem}", temporary=True)
                case swap_protocol.Put(pause=pause) | swap_protocol.Get(pause=pause):
                    if pause:
                        self._sleep(pause)
                    event, problem = self._perform(effect, problem)
                    state, effect = swap_protocol.step(state, event)
                case _:
                    assert_never(effect)

    def _perform(
        self, effect: swap_protocol.Put | swap_protocol.Get, problem: StoreError | None
    ) -> tuple[swap_protocol.Event, StoreError | None]:
        try:
            if isinstance(effect, swap_protocol.Get):
                latest = self.latest()
                return swap_protocol.GetOk(latest.pointer, latest.etag), problem
            data = effect.pointer.to_bytes()
            self.store.put(LATEST, data, only_if_absent=effect.if_match is None, if_match=effect.if_match)
            return swap_protocol.PutOk(), problem
        except PreconditionFailed as error:
            return swap_protocol.PutRefused(), error
        except Conflict as error:
            return swap_protocol.PutUnsure(), error
        except StoreError as error:
            if not error.temporary:
                raise
            failed = swap_protocol.GetFailed() if isinstance(effect, swap_protocol.Get) else swap_protocol.PutUnsure()
            return failed, error

    def _exists(self, key: str) -> bool:
        return any(entry.key == key for entry in self.store.list(key))

    def _report(self, problem: str) -> None:
        if problem not in self.problems:
            log.warning("%s; trying its parent", problem)
            self.problems.append(problem)


def read_manifest(store: ObjectStore, point: RestorePoint, s3: S3Spec | None = None) -> Manifest:
    """The manifest that ``point`` names, in ``store`` or, where it is a full URI, in another; raises Corrupt."""
    home, key = locate(store, point, s3)
    where = f"{home.uri}/{key}"
    try:
        data, _ = home.get(key)
    except NotFound:
        raise Corrupt(f"{where} is missing") from None
    if hashlib.sha256(data).hexdigest() != point.sha256:
        raise Corrupt(f"{where} differs from its checksum")
    manifest = Manifest.from_bytes(data, where)
    if manifest.state != point.state:
        raise Corrupt(f"{where} speaks of another state, {manifest.folder}")
    return manifest


def locate(store: ObjectStore, point: RestorePoint, s3: S3Spec | None = None) -> tuple[ObjectStore, str]:
    """The store and the key of a point's manifest."""
    if "://" not in point.manifest:
        return store, point.manifest
    root, folder, name = point.manifest.rsplit("/", 2)
    return open_store(root, s3), f"{folder}/{name}"


def resolve(uri: str, s3: S3Spec | None = None) -> RestorePoint:
    """The restore point that ``checkpoint.resumeFrom`` names; raises UserError, StoreError."""
    root, folder, name = parts_of(uri)
    try:
        data, _ = open_store(root, s3).get(f"{folder}/{name}")
        state = Manifest.from_bytes(data, uri).state
    except NotFound:
        raise UserError(
            f"checkpoint.resumeFrom: {uri} does not exist; `lockstep checkpoint ls {root}` shows what does"
        ) from None
    except Corrupt as error:
        raise _not_whole(root, error) from None
    return RestorePoint(state, uri, hashlib.sha256(data).hexdigest())


def parts_of(uri: str) -> tuple[str, str, str]:
    """Store, step folder and name of the manifest that ``checkpoint.resumeFrom`` names; raises UserError where it names
    none."""
    if uri.count("/") < 4 or not uri.endswith(f"/{MANIFEST}"):
        raise UserError(
            f"checkpoint.resumeFrom: {uri} is no manifest; write the URI of a manifest.json, "
            "for example s3://bucket/prefix/namespace/job/uid/step-100-e1-g1/manifest.json"
        )
    root, folder, name = uri.rsplit("/", 2)
    return root, folder, name


def no_older(point: RestorePoint, error: Corrupt) -> UserError:
    """The end of a job that can't read ``point`` and has nothing behind it."""
    if "://" in point.manifest:
        return _not_whole(point.manifest.rsplit("/", 2)[0], error)
    return UserError(
        f"checkpoint.uri: {error}, and there is no older checkpoint: bring its files back, or start a new job"
    )


def _not_whole(root: str, error: Corrupt) -> UserError:
    return UserError(
        f"checkpoint.resumeFrom: {error}; `lockstep checkpoint verify --all {root}` says which checkpoints of that job "
        "are whole: name one of them"
    )


def _superseded(term: Term, pointer: Pointer) -> str:
    return f"term {_text(pointer.term)} has taken over from term {_text(term)}"


def _text(term: Term) -> str:
    return f"{term.epoch}/{term.generation}"
