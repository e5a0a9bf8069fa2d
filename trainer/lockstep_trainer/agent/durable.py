"""The leader's hand on the object store: fence, commit, journal, garbage; in one thread, in order.

Nothing here may stop training: what fails is told to the core as a problem and tried again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lockstep_api.messages import Cut, RestorePoint, Term
from lockstep_trainer.agent.spoil import spoil_store
from lockstep_trainer.errors import (
    Corrupt,
    NotStored,
    PreconditionFailed,
    StoreError,
    Superseded,
    TrainerError,
    UserError,
)
from lockstep_trainer.protocol import events
from lockstep_trainer.protocol.effects import Commit
from lockstep_trainer.supervisor import write_json

if TYPE_CHECKING:
    from lockstep_trainer.agent.settings import Job
    from lockstep_trainer.checkpoint.chain import Chain

T = TypeVar("T")
log = logging.getLogger(__name__)

_RETRY_SECONDS = (0.25, 0.5, 1.0, 2.0, 4.0)
_FLUSH_SECONDS = 2.0
_URGENT = frozenset({"fault", "recovered", "rollback", "settled", "checkpoint", "finished"})
_LONGEST_BACKLOG = 50_000  # journal lines kept while the store is away; then the oldest go


class DurableStore:
    """The chain and the journal of a job."""

    def __init__(self, job: Job, run_dir: Path, tell: Callable[[events.Event], None]) -> None:
        self._job = job
        self._position = run_dir / "journal-position"  # newest step line in the store: a new agent goes on behind it
        self._tell = tell
        self._nonce = secrets.token_hex(8)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._journal_thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._chain: Chain | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._choosing: asyncio.Task[None] | None = None
        self._lines: list[dict[str, Any]] = []
        self._files: int | None = None  # the newest of ours or of an earlier agent; None: not asked yet
        self._written: list[int] = json.loads(self._position.read_text()) if self._position.exists() else []
        self._urgent = asyncio.Event()
        self._flushing = asyncio.Lock()

    def choose(self, term: Term, cut: Cut | None = None, at: RestorePoint | None = None) -> None:
        """Fence to ``term``, move ``latest`` behind ``cut`` and back to ``at``, tell the newest restore point; tries
        until it has an answer. A question before it is called off: its answer is not told any more, since the core
        takes any answer for that to its last question of the term."""
        if self._choosing:
            self._choosing.cancel()
        self._choosing = self._spawn(self._choose(term, cut, at))

    def commit(self, order: Commit) -> None:
        """Make this state the newest, and tell."""
        self._spawn(self._commit(order))

    def journal(self, line: dict[str, Any]) -> None:
        """Write this line soon. Steps that an earlier agent has written are told again by members, and passed over."""
        if line["kind"] == "step" and _place(line) <= self._written:
            return
        self._lines.append(line)
        if not self._flushing.locked():  # what is being written goes from the front when it is there
            del self._lines[:-_LONGEST_BACKLOG]
        if line["kind"] in _URGENT:
            self._urgent.set()

    async def spoil(self, rank: int) -> str:
        """Flip a byte in a shard of ``rank`` of the newest checkpoint, on purpose; raises TrainerError."""
        return await self._call(lambda: spoil_store(self._open(), rank))

    async def write_journal(self) -> None:
        """Flush every few seconds, at once where it matters; never returns."""
        while True:
            try:
                async with asyncio.timeout(_FLUSH_SECONDS):
                    await self._urgent.wait()
            except TimeoutError:
                pass
            self._urgent.clear()
            if not await self.flush():
                await asyncio.sleep(_FLUSH_SECONDS)

    async def flush(self) -> bool:
        """Write all lines so far; False where the store does not take them."""
        if not self._job.spec.get("checkpoint"):
            self._lines.clear()
            return True
        async with self._flushing:
            left = len(self._lines)
            while left:
                lines = self._lines[:left]
                try:
                    count = await asyncio.get_running_loop().run_in_executor(
                        self._journal_thread, self._put_lines, lines
                    )
                except TrainerError as error:
                    log.warning("journal: %s", error)
                    return False
                del self._lines[:count]
                left -= count
                steps = [_place(line) for line in lines[:count] if line["kind"] == "step"]
                if steps:
                    self._written = max(self._written, steps[-1])
                    write_json(self._position, self._written)
            return True

    def close(self) -> None:
        """Stop; what is under way in a thread ends on its own."""
        for task in self._tasks:
            task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._journal_thread.shutdown(wait=False, cancel_futures=True)

    # ---------------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _choose(self, term: Term, cut: Cut | None, at: RestorePoint | None) -> None:
        attempt = 0
        while True:
            try:
                chosen = await self._call(lambda: self._choose_now(term, cut, at))
            except Superseded as error:
                log.warning("%s", error)
                self._tell(events.RestoreUnavailable(term, str(error)))
                return
            except TrainerError as error:
                lasting = isinstance(error, StoreError) and not error.temporary
                fatal = lasting or isinstance(error, Corrupt | UserError)
                self._tell(events.RestoreUnavailable(term, str(error), fatal=fatal))
                if fatal:
                    return
                log.warning("choosing a restore point: %s", error)
            except Exception as error:
                log.exception("choosing a restore point")
                self._tell(events.RestoreUnavailable(term, f"{type(error).__name__}: {error}"))
            else:
                self._tell(chosen)
                return
            await asyncio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
            attempt += 1

    async def _commit(self, order: Commit) -> None:
        begun, state = time.monotonic(), order.state
        try:
            done = await self._call(lambda: self._commit_now(order, begun))
        except TrainerError as error:
            log.warning("commit of step %d: %s", state.step, error)
            superseded, lost = isinstance(error, Superseded), isinstance(error, NotStored)
            self._tell(events.CommitFailed(order.term, state, str(error), superseded=superseded, lost=lost))
            return
        except Exception as error:  # a task that ends without a word would be waited for for ever
            log.exception("commit of step %d", state.step)
            self._tell(events.CommitFailed(order.term, state, f"{type(error).__name__}: {error}"))
            return
        self._tell(done)
        try:
            await self._call(lambda: self._collect_garbage(order.term, order.agreed))
        except TrainerError as error:
            log.warning("retention: %s", error)

    def _open(self) -> Chain:
        """In the thread: its imports are slow."""
        if self._chain is None:
            from lockstep_api.v1alpha1 import CheckpointSpec
            from lockstep_trainer.checkpoint.chain import Chain
            from lockstep_trainer.storage import open_store

            spec = CheckpointSpec.of_server(self._job.spec["checkpoint"])
            store = open_store(spec.uri, spec.s3)
            self._chain = Chain(store, self._job.checkpoint_prefix, s3=spec.s3, resume_from=spec.resume_from)
        return self._chain

    def _choose_now(self, term: Term, cut: Cut | None, at: RestorePoint | None) -> events.RestoreChosen:
        chain = self._open()
        restore = chain.fence(term, self._nonce, cut, at)
        if restore is None or "://" in restore.manifest:
            return events.RestoreChosen(term, restore)
        listing = chain.manifest(restore)
        uri = f"{chain.store.uri}/{restore.manifest}"
        return events.RestoreChosen(term, restore, uri, listing.written_at, listing.verified)

    def _commit_now(self, order: Commit, begun: float) -> events.CommitDone:
        from lockstep_trainer.checkpoint.upload import check_stored, listing_of

        chain = self._open()
        try:
            listing = listing_of(order.header, order.parent, order.files)
        except Corrupt as error:
            raise NotStored(str(error)) from error
        check_stored(chain.store, listing)
        restore = chain.commit(listing, order.term, self._nonce)
        uri, seconds = f"{chain.store.uri}/{restore.manifest}", time.monotonic() - begun
        return events.CommitDone(order.term, restore, uri, seconds, listing.size, listing.verified)

    def _collect_garbage(self, term: Term, agreed: int | None) -> None:
        from lockstep_trainer.checkpoint.garbage import collect_garbage
        from lockstep_trainer.checkpoint.retention import Keep

        keep = Keep(**self._job.spec["checkpoint"].get("keep", {}), verified=agreed)
        collect_garbage(self._open(), keep, term=term)

    def _put_lines(self, lines: list[dict[str, Any]]) -> int:
        """Write a file of these lines; returns how many of them, from the first on, are in the store then."""
        store, newest = self._open().store, lines[-1]
        prefix = f"journal/e{newest['epoch']}-g{newest['generation']}-"
        if self._files is None:
            self._files = max((_number(entry.key) for entry in store.list(prefix)), default=0)
        data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        while True:
            key = f"{prefix}{self._files + 1}.jsonl"
            try:
                store.put(key, data, only_if_absent=True)
            except PreconditionFailed:
                existing, _ = store.get(key)
                self._files += 1
                if existing and data.startswith(existing):  # an earlier try of ours, whose answer was lost
                    return existing.count(b"\n")
            else:
                self._files += 1
                return len(lines)


def _number(key: str) -> int:
    """Of a journal file, ``journal/e1-g1-<number>.jsonl``; 0 for what is none."""
    number = key.removesuffix(".jsonl").rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else 0


def _place(line: dict[str, Any]) -> list[int]:
    """Where a step line stands in the run."""
    return [line["epoch"], line["generation"], line["step"]]
