"""The worker's end of checkpoints: restore before the first step, save between steps.

All ranks call these methods together. What fails on one of them fails on all in the same way, so that they go on
together: to the parent checkpoint where bytes are corrupt, to a later try where the store is away.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lockstep_api.messages import RestorePoint, StateId
from lockstep_trainer import __version__
from lockstep_trainer.agreement import by_first
from lockstep_trainer.checkpoint.chain import Chain, locate, read_manifest
from lockstep_trainer.checkpoint.manifest import Layout, Listing, Manifest, SamplerState
from lockstep_trainer.checkpoint.state import load_state, save_state
from lockstep_trainer.config import Job, Orders
from lockstep_trainer.data.order import Draws
from lockstep_trainer.errors import Corrupt, StoreError, TrainerError, UserError
from lockstep_trainer.outbox import Outbox
from lockstep_trainer.parallel.layout import Layout as Degrees
from lockstep_trainer.ranks import Ranks
from lockstep_trainer.storage import open_store

_EVERY_AUTO = 1000  # steps between checkpoints where the job leaves it to us

T = TypeVar("T")
log = logging.getLogger(__name__)

_PAUSES = (1.0, 2.0, 5.0)
"""Seconds between tries where nothing else is left to do than to wait for the store; the last one repeats."""


class Keeper:
    """Saves and restores the training state of one rank."""

    def __init__(self, job: Job, orders: Orders, ranks: Ranks, outbox: Outbox, sampler: SamplerState) -> None:
        """``sampler`` is the state of a job that has done no step: later ones differ in the steps done alone."""
        self._job, self._orders, self._ranks, self._outbox = job, orders, ranks, outbox
        self._sampler = sampler
        layout = self._layout = Degrees.of(job.spec.parallelism, ranks.size)
        at = layout.coordinates(ranks.rank)
        self._data_rank = layout.data_rank(ranks.rank)
        # All ranks of one data coordinate read the same samples: the first of them keeps the log.
        self._logs = (at.pipeline, at.context, at.tensor) == (0, 0, 0)
        self._store = open_store(job.checkpoint.uri, job.checkpoint.s3).below(job.prefix)
        self._restored: RestorePoint | None = None
        self._consumed: list[tuple[int, str]] = []  # (step, line) since the parent checkpoint
        self._every = job.checkpoint.interval or _EVERY_AUTO
        self._next_save = 0

    # --- restore ------------------------------------------------------------------------------------------------

    def restore(self, state: dict[str, Any]) -> int | None:
        """Load into ``state`` what the orders name, or the nearest whole ancestor of it, and return its step.

        None without a checkpoint: ``state`` is as it was. Raises UserError where the data is not what the checkpoint
        was trained on, TrainerError where nothing whole is left.
        """
        begun = time.monotonic()
        point = self._orders.restore
        manifest: Manifest | None = None
        while point is not None and manifest is None:
            candidate = self._manifest(point)
            try:
                self._load(point, candidate, state)
                manifest = candidate
            except Corrupt as error:
                self._problem(str(error), candidate.state.step)
                log.warning("%s; trying its parent", error)
                point = candidate.parent
                if point is None:
                    raise TrainerError(f"{error}; it has no parent: bring the files back or start anew") from error
        self._restored = point
        step = manifest.state.step if manifest else None
        self._plan(step or 0)
        if self._ranks.leads:
            self._outbox.event(
                "restore", step=step or 0, manifest=point and point.manifest, seconds=time.monotonic() - begun
            )
        return step

    def _load(self, point: RestorePoint, manifest: Manifest, state: dict[str, Any]) -> None:
        self._check_data(point, manifest)
        store, _ = locate(self._store, point, self._job.checkpoint.s3)
        self._until_stored(lambda: load_state(state, store, manifest.folder, manifest, group=self._ranks.control))

    def _manifest(self, point: RestorePoint) -> Manifest:
        """Rank 0 reads it for all; its error is everybody's."""

        def read() -> Manifest:
            return self._until_stored(lambda: read_manifest(self._store, point, self._job.checkpoint.s3))

        return by_first(read, self._ranks.control)

    def _check_data(self, point: RestorePoint, manifest: Manifest) -> None:
        """Raises UserError where the order of samples would not go on as it began, unless the job accepts that."""
        change = self._sampler.changes(manifest.sampler)
        if not change:
            return
        step = manifest.sampler.steps
        # Another job's checkpoint may have had other data: it is only said.
        if "://" not in point.manifest and self._job.trainer.data.on_change != "Accept":
            raise UserError(
                f"trainer.data: it is not what {point.manifest} was trained on: {change}; bring the same data back, or "
                "set trainer.data.onChange to Accept to go on with this at the same sample count"
            )
        log.warning("%s was trained on other data (%s); this job's go on at step %d", point.manifest, change, step)
        if self._ranks.leads:
            self._outbox.event("data_changed", step=step, manifest=point.manifest, message=change)

    # --- save ---------------------------------------------------------------------------------------------------

    def consumed(self, step: int, draws: Draws) -> None:
        """Log which samples ``step`` consumes on this data-parallel rank, before it does."""
        if not self._logs:
            return
        line = json.dumps(
            {
                "step": step,
                "epoch": self._orders.epoch,
                "generation": self._orders.generation,
                "rank": self._data_rank,
                "first": int(draws.index[0]),
                "sources": draws.source.tolist(),
                "samples": draws.sample.tolist(),
            }
        )
        self._outbox.samples(line)
        self._consumed.append((step, line))

    def due(self, step: int) -> bool:
        """Whether the state behind ``step`` is to be saved."""
        return step >= self._next_save or self._is_last(step)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the step folder and tell the agent; the leader commits it.

        While the store is away training goes on, and the next try comes a tenth of the interval later. Behind the last
        step there is nothing to go on with: it waits for the store.
        """
        try:
            if self._is_last(step):
                parent = self._until_stored(self._parent)
                self._until_stored(lambda: self._write(step, state, parent))
            else:
                self._write(step, state, self._parent())
        except StoreError as error:
            if not error.temporary:
                raise
            self._problem(str(error), step)
            self._next_save = step + max(1, self._every // 10)
        else:
            self._plan(step)

    def _write(self, step: int, state: dict[str, Any], parent: RestorePoint | None) -> None:
        begun, at = time.monotonic(), time.time()
        since = parent.state.step if parent else 0
        self._consumed = [(number, line) for number, line in self._consumed if number > since]
        samples = "".join(f"{line}\n" for _, line in self._consumed)
        identity = StateId(step, self._orders.epoch, self._orders.generation)
        listing = Listing(
            state=identity,
            parent=parent,
            files=(),
            layout=Layout(
                world_size=self._layout.world_size,
                replicate=self._layout.replicate,
                shard=self._layout.shard,
                context=self._layout.context,
                tensor=self._layout.tensor,
                pipeline=self._layout.pipeline,
                expert=self._layout.expert,
                data_width=self._layout.data_width,
            ),
            sampler=self._sampler.behind(step),
            versions={"lockstep": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
            verified=("loss and gradient norm are finite",),
            written_at=at,
            seconds=0.0,
        )
        files = save_state(
            state,
            self._store,
            listing.folder,
            extra={f"samples-r{self._data_rank}.jsonl": samples.encode()} if self._logs else {},
            group=self._ranks.control,
        )
        if self._ranks.leads:
            self._outbox.saved(listing.model_copy(update={"files": files, "seconds": time.monotonic() - begun}))

    def _parent(self) -> RestorePoint | None:
        """What the new state descends from: the newest one of this generation that the leader has committed, else the
        one that was restored. Rank 0 looks, for all."""

        def look() -> RestorePoint | None:
            committed = Chain(self._store).latest().point
            own = committed and (committed.state.epoch, committed.state.generation)
            return committed if own == (self._orders.epoch, self._orders.generation) else self._restored

        return by_first(look, self._ranks.control)

    # ------------------------------------------------------------------------------------------------------------

    def _until_stored(self, call: Callable[[], T]) -> T:
        """Try until the store answers. The agent sees the section and knows that this worker waits."""
        tries = 0
        while True:
            try:
                return call()
            except StoreError as error:
                if not error.temporary:
                    raise
                self._problem(str(error), None)
                time.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1

    def _problem(self, message: str, step: int | None) -> None:
        log.warning("%s", message)
        if self._ranks.leads:
            self._outbox.event("checkpoint_problem", step=step, message=message)

    def _is_last(self, step: int) -> bool:
        return step == self._job.trainer.recipe.steps

    def _plan(self, step: int) -> None:
        self._next_save = (step // self._every + 1) * self._every
