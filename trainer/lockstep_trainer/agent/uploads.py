"""Brings staged states to the store, as the leader orders; goes on trying until it is told otherwise."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from lockstep_api.messages import StateId
from lockstep_trainer.checkpoint.snapshots import BUDDIES, UPLOADING, NoSnapshotError, held, rank_folder, write_state
from lockstep_trainer.errors import Corrupt, TrainerError, let_go
from lockstep_trainer.protocol.effects import UploadState
from lockstep_trainer.protocol.events import Event, StateUploaded, UploadFailed

if TYPE_CHECKING:
    from pathlib import Path

    from lockstep_trainer.agent.settings import Job
    from lockstep_trainer.checkpoint.upload import RankUpload
    from lockstep_trainer.storage import ObjectStore

log = logging.getLogger(__name__)

_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before the next try, up to half of it more or less; the last one repeats."""
_AT_ONCE = 4  # ranks of the pod; each file goes in parallel parts besides


def _has(folder: Path, state: StateId) -> bool:
    return any(snapshot.state == state for snapshot in held(folder).values())


class Uploads:
    """The uploads of this node's ranks: one order at a time."""

    def __init__(self, job: Job, root: Path, tell: Callable[[Event], None]) -> None:
        """``root``: the folder ``snapshots``."""
        self._job, self._root, self._tell = job, root, tell
        self._mark(None)  # that of an earlier agent: the leader orders again
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload")
        self._task: asyncio.Task[None] | None = None
        self._order: UploadState | None = None
        self._ranks: tuple[int, ...] = ()
        self._store: ObjectStore | None = None
        self.seconds = 0.0
        """Of finished uploads."""
        self.bytes = 0
        """Sent, or found there."""

    def order(self, order: UploadState, slot: int) -> None:
        """Upload this state of the slot's ranks; an older order is given up. Telling it again changes nothing."""
        running = self._task is not None and not self._task.done()
        per_slot = self._job.spec["gpusPerNode"]
        slots = order.slots or (slot,)
        ranks = tuple(rank for slot in slots for rank in range(slot * per_slot, (slot + 1) * per_slot))
        known = (self._order.state, self._order.parent, self._ranks) if self._order else None
        if running and known == (order.state, order.parent, ranks):
            return
        self.stop()
        self._order, self._ranks = order, ranks
        self._mark(order.state)
        self._task = asyncio.create_task(self._run(order, ranks))

    def forget(self, step: int, is_older: Callable[[StateId], bool]) -> None:
        """States beyond ``step`` of which ``is_older`` is true are of no lineage any more."""
        if self._order and self._order.state.step > step and is_older(self._order.state):
            self.stop()

    def stop(self) -> None:
        """Give up what is under way; a file that is being sent is finished."""
        self._order = None
        self._mark(None)
        if self._task:
            self._task.cancel()
            self._task = None

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ----------------------------------------------------------------------------------------------------------------

    def _mark(self, state: StateId | None) -> None:
        """Workers overwrite this state last."""
        write_state(self._root / UPLOADING, state)

    async def _run(self, order: UploadState, ranks: tuple[int, ...]) -> None:
        attempt = 0
        while True:
            begun = time.monotonic()
            try:
                done = await self._try(order, ranks)
            except (NoSnapshotError, Corrupt) as error:
                log.warning("upload of step %d: %s", order.state.step, error)
                self._mark(None)
                self._tell(UploadFailed(order.state, str(error), gone=True))
                return
            except TrainerError as error:
                log.warning("upload of step %d: %s", order.state.step, error)
                self._tell(UploadFailed(order.state, str(error)))
            except Exception as error:  # a task that ends without a word would be waited for for ever
                log.exception("upload of step %d", order.state.step)
                self._tell(UploadFailed(order.state, f"{type(error).__name__}: {error}"))
            else:
                self.seconds += time.monotonic() - begun
                files = tuple(file for each in done for file in each.files)
                header = next((each.header for each in done if each.header is not None), None)
                self._mark(None)
                self._tell(StateUploaded(order.state, files, header))
                return
            # Jitter: when a store comes back, the agents of a job must not come all at once.
            await asyncio.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)] * random.uniform(0.5, 1.5))
            attempt += 1

    async def _try(self, order: UploadState, ranks: tuple[int, ...]) -> list[RankUpload]:
        """All ranks; where one fails the others still finish, so that the next try finds their files there."""
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(self._pool, self._upload, order, rank) for rank in ranks]
        found = await asyncio.gather(*calls, return_exceptions=True)
        errors = [each for each in found if isinstance(each, BaseException)]
        # What can't be helped comes before what can be tried again.
        errors.sort(key=lambda error: not isinstance(error, NoSnapshotError | Corrupt))
        if errors:
            raise errors[0]
        return [each for each in found if not isinstance(each, BaseException)]

    def _upload(self, order: UploadState, rank: int) -> RankUpload:
        """In a thread: its imports are slow, and it blocks."""
        from lockstep_trainer.checkpoint.upload import upload_rank

        def sent(count: int) -> None:
            self.bytes += count

        try:
            return upload_rank(
                self._folder(order.state, rank),
                order.state,
                order.parent,
                self._open(),
                wanted=lambda: self._order is order,
                sent=sent,
            )
        except Exception as error:
            let_go(error)
            raise

    def _folder(self, state: StateId, rank: int) -> Path:
        """Where its snapshot lies: at home, or among those that are kept for a buddy."""
        own, copy = rank_folder(self._root, rank), rank_folder(self._root / BUDDIES, rank)
        return copy if _has(copy, state) and not _has(own, state) else own

    def _open(self) -> ObjectStore:
        if self._store is None:
            from lockstep_api.v1alpha1 import CheckpointSpec
            from lockstep_trainer.storage import open_store

            spec = CheckpointSpec.of_server(self._job.spec["checkpoint"])
            self._store = open_store(spec.uri, spec.s3).below(self._job.checkpoint_prefix)
        return self._store
