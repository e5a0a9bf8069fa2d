"""The worker's end of checkpoints: restore before the first step, snapshots between steps.

All ranks call these methods together. What fails on one of them fails on all in the same way, so that they go on
together: to the store where a copy in memory is damaged, to the parent checkpoint where bytes in the store are.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lockstep_api.messages import RestorePoint, StateId
from lockstep_trainer import __version__
from lockstep_trainer.agreement import by_first, from_all
from lockstep_trainer.checkpoint.buffers import check_room
from lockstep_trainer.checkpoint.chain import Chain, locate, no_older, read_manifest
from lockstep_trainer.checkpoint.manifest import Layout, Listing, Manifest, SamplerState
from lockstep_trainer.checkpoint.pace import Pace, charged
from lockstep_trainer.checkpoint.planning import Planned, plan_snapshots
from lockstep_trainer.checkpoint.recall import recall
from lockstep_trainer.checkpoint.request import Requests
from lockstep_trainer.checkpoint.samplelog import SampleLog
from lockstep_trainer.checkpoint.snapshots import NoSnapshotError, Root, Snapshot, order, rank_folder, read_state
from lockstep_trainer.checkpoint.stage import Facts, Stage
from lockstep_trainer.checkpoint.state import load_state
from lockstep_trainer.config import Job, Orders
from lockstep_trainer.data.order import Draws
from lockstep_trainer.errors import Corrupt, UserError
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.outbox import Outbox
from lockstep_trainer.parallel.layout import Layout as Degrees
from lockstep_trainer.ranks import Ranks
from lockstep_trainer.storage import open_store
from lockstep_trainer.storage.retries import until_answered

T = TypeVar("T")
log = logging.getLogger(__name__)

_BUFFER_SECONDS = 0.05
"""Between two looks for a free buffer behind the last step, and for the end of a generation that is to end."""
HOLD_SECONDS = 120.0
"""How long workers wait for that end. What does not come by then is taken to be forgotten, and training goes on."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What a rank puts into the all-reduce of a step; summed over the ranks it is what all of them act on."""

    asked: float  # 1: somebody asked this node for a snapshot
    hold: float  # 1: and for no step behind it
    missing: float  # 1: a snapshot is due, and this rank has no free buffer for it
    cost: float  # seconds that the newest snapshot cost
    seconds: float  # of the last step

    def numbers(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return self.asked, self.hold, self.missing, self.cost, self.seconds


class Keeper:
    """Takes and restores the training state of one rank."""

    def __init__(
        self,
        job: Job,
        orders: Orders,
        ranks: Ranks,
        outbox: Outbox,
        *,
        sampler: SamplerState,
        config: DecoderConfig | None,
        costs: tuple[float, ...] | None = None,
        snapshots: Path,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``sampler`` is the state of a job that has done no step: later ones differ in the steps done alone.
        ``config``: the model's, None for one of the user's own; ``costs``: as in ``Listing``; ``snapshots``: the folder
        of that name in the run folder; ``check`` raises where this worker must not wait any longer."""
        self._job, self._orders, self._ranks, self._outbox = job, orders, ranks, outbox
        self._sampler = sampler
        self._model, self._costs = asdict(config) if config else None, costs
        layout = self._layout = Degrees.of(job.spec.parallelism, ranks.size)
        at = layout.coordinates(ranks.rank)
        self._data_rank = layout.data_rank(ranks.rank)
        # All ranks of one data coordinate read the same samples: the first of them keeps the log.
        self._logs = (at.pipeline, at.context, at.tensor) == (0, 0, 0)
        self._store = open_store(job.checkpoint.uri, job.checkpoint.s3).below(job.prefix)
        self._snapshots = snapshots
        self._check = check
        self._folder = rank_folder(snapshots, ranks.rank)
        self._root = Root(orders.term, None)
        self._recalled: StateId | None = None
        self._log = SampleLog(snapshots / "durable.json", orders.term)
        self._stage: Stage | None = None
        self._planned: Planned | None = None
        self._pace = Pace(job.trainer.recipe.steps, job.checkpoint.interval, job.checkpoint.memory.interval)
        self._requests = Requests(snapshots)
        self._holding = False
        self._left_out = 0
        self._agreed: int | None = None
        self._step_at = time.perf_counter()
        self._step_seconds = 0.0

    # --- restore ------------------------------------------------------------------------------------------------

    def restore(self, state: dict[str, Any], *, changes: Callable[[str], bool] = lambda _: False) -> int | None:
        """Load into ``state`` what the orders name, or the nearest whole ancestor of it, and return its step.

        None without a checkpoint: ``state`` is as it was. ``changes``: whether forward passes change the tensor of
        this name in the flattened state. Raises UserError where snapshots do not fit into memory or the data is not
        what the checkpoint was trained on, or where nothing whole is left.
        """
        begun = time.monotonic()
        planned = self._plan(state, changes)
        snapshot = self._recall(planned, state) if self._orders.memory else None
        if snapshot is not None:
            step, source, manifest = snapshot.state.step, "memory", None
        else:
            point = self._from_store(state)
            self._root = Root(self._orders.term, point)
            step, source, manifest = (point.state.step if point else 0), "store", point and point.manifest
            self._log.restored(step)
        self._pace.took(step)
        assert self._stage is not None
        self._stage.buffers.remove_unused()
        self._stage.prepare(self._is_protected)
        if self._ranks.leads:
            seconds = time.monotonic() - begun
            point = self._root.point if source == "store" else None
            self._outbox.event(
                "restore",
                step=step,
                manifest=manifest,
                source=source,
                seconds=seconds,
                # Where this is not what was ordered, the leader goes by what is said here.
                sha256=point and point.sha256,
                state=point and [point.state.step, point.state.epoch, point.state.generation],
                agreed=self._agreed,
            )
        return step if snapshot is not None or self._root.point is not None else None

    def _plan(self, state: dict[str, Any], changes: Callable[[str], bool]) -> Planned:
        """Agree with all ranks on what snapshots look like, and see to it that they fit."""
        planned = self._planned = plan_snapshots(
            state, self._degrees(), rank=self._ranks.rank, group=self._ranks.control
        )
        sizes = from_all((self._orders.node_rank, planned.plan.size), self._ranks.control)
        memory, nodes = self._job.checkpoint.memory, self._ranks.size // self._orders.local_world_size
        problem = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            own = [size for node, size in sizes if node == self._orders.node_rank]
            check_room(self._snapshots, own, buddy=memory.buddy and nodes > 1, limit=memory.limit_bytes)
        except UserError as error:
            problem = str(error)
        problems = [each for each in from_all(problem, self._ranks.control) if each]
        if problems:
            raise UserError(problems[0])
        self._stage = Stage(self._folder, planned, self._ranks.device, changes=changes)
        return planned

    def _recall(self, planned: Planned, state: dict[str, Any]) -> Snapshot | None:
        """The snapshot that the orders name, from this pod's memory; None where a rank does not have it whole."""
        assert self._orders.memory is not None
        wanted = self._orders.memory.state
        found: tuple[Snapshot, str] | None = None
        problem = None
        try:
            found = recall(self._folder, planned, wanted, planned.sources(state))
        except (Corrupt, NoSnapshotError) as error:
            problem = f"rank {self._ranks.rank}: {error}"
        problems = [each for each in from_all(problem, self._ranks.control) if each]
        if problems or found is None:
            self._problem(f"{'; '.join(problems[:3])}; restoring from the store", wanted.step)
            return None
        snapshot, text = found
        sampler = SamplerState.model_validate(snapshot.header["sampler"])
        self._check_data(sampler, f"the snapshot of step {wanted.step}", foreign=False)
        self._agreed = snapshot.header.get("agreed")
        self._root, self._recalled = snapshot.root, wanted
        self._log.recalled(wanted.step, snapshot.since, text, snapshot.root.term)
        return snapshot

    def _from_store(self, state: dict[str, Any]) -> RestorePoint | None:
        point = self._orders.restore
        while point is not None:
            try:
                self._load(point, self._manifest(point), state)
            except Corrupt as error:
                self._problem(str(error), point.state.step)
                log.warning("%s; trying the one before it", error)
                older = self._older(point)
                if older is None:
                    raise no_older(point, error) from error
                point = older
            else:
                return point
        return None

    def _older(self, point: RestorePoint) -> RestorePoint | None:
        """Rank 0 looks it up for all."""
        chain = Chain(self._store, s3=self._job.checkpoint.s3)
        return by_first(lambda: self._until_stored(lambda: chain.older(point)), self._ranks.control)

    def _load(self, point: RestorePoint, manifest: Manifest, state: dict[str, Any]) -> None:
        # Another job's checkpoint may have had other data: it is only said.
        self._check_data(manifest.sampler, point.manifest, foreign="://" in point.manifest)
        self._agreed = None if "://" in point.manifest else manifest.agreed
        store, _ = locate(self._store, point, self._job.checkpoint.s3)
        self._until_stored(lambda: load_state(state, store, manifest.folder, manifest, group=self._ranks.control))

    def _manifest(self, point: RestorePoint) -> Manifest:
        """Rank 0 reads it for all; its error is everybody's."""

        def read() -> Manifest:
            return self._until_stored(lambda: read_manifest(self._store, point, self._job.checkpoint.s3))

        return by_first(read, self._ranks.control)

    def _check_data(self, before: SamplerState, where: str, *, foreign: bool) -> None:
        """Raises UserError where the order of samples would not go on as it began, unless the job accepts that."""
        change = self._sampler.changes(before)
        if not change:
            return
        step = before.steps
        if not foreign and self._job.trainer.data.on_change != "Accept":
            raise UserError(
                f"trainer.data: it is not what {where} was trained on: {change}; bring the same data back, or "
                "set trainer.data.onChange to Accept to go on with this at the same sample count"
            )
        log.warning("%s was trained on other data (%s); this job's go on at step %d", where, change, step)
        if self._ranks.leads:
            self._outbox.event("data_changed", step=step, manifest=where, message=change)

    def replayed(self, step: int) -> None:
        """The replay of that step gave the same bits on all ranks."""
        self._agreed = step

    # --- snapshots ----------------------------------------------------------------------------------------------

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
        self._log.add(step, line)

    def vote(self, step: int) -> Vote:
        """What this rank brings to the agreement in ``step``, behind which a snapshot may be due."""
        assert self._stage is not None
        now = time.perf_counter()
        self._step_seconds, self._step_at = now - self._step_at, now
        due = self._pace.due(step) and not self._is_last(step)
        missing = due and not self._stage.reserve(self._is_protected)
        cost = self._stage.cost
        request = self._requests.look()
        return Vote(
            float(request is not None),
            float(request is not None and request.hold),
            float(missing),
            charged(cost.blocked, cost.whole) if cost else 0.0,
            self._step_seconds,
        )

    def agreed(self, step: int, vote: Vote) -> bool:
        """Act on the sum of all votes in ``step``: True where all ranks take a snapshot behind it."""
        assert self._stage is not None
        due = self._pace.due(step)
        taking = due and vote.missing == 0
        if due and not taking:
            self._stage.release()
            self._left_out += 1
        self._pace.measured(vote.cost / self._ranks.size, vote.seconds / self._ranks.size)
        if vote.asked:
            self._pace.asked = True
        self._holding = (self._holding or vote.hold > 0) and not self._is_last(step)
        return taking

    def take(self, step: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Begin the snapshot of what ``state`` returns, behind ``step``; it must not change before ``wait``. All that
        this takes counts as time that training stood still.

        Behind the last step, where nothing is left to do beside it, it is whole when this returns.
        """
        assert self._stage is not None
        assert self._planned is not None
        last = self._is_last(step)
        if last:
            self._stage.finish()
            while not self._stage.reserve(self._is_protected):  # the agent frees one, when a state is kept
                self._check()
                time.sleep(_BUFFER_SECONDS)
        begun = time.perf_counter()
        text = self._log.text() if self._logs else ""
        facts = Facts(
            state=StateId(step, self._orders.epoch, self._orders.generation),
            header=self._header(step),
            root=self._root,
            since=self._log.since,
            samples=f"samples-r{self._data_rank}.jsonl" if self._logs else None,
            log=text,
            left_out=self._left_out,
        )
        self._stage.begin(self._planned.sources(state()), facts, begun=begun)
        self._pace.took(step)
        if last:
            self._stage.finish()

    @property
    def holds(self) -> bool:
        """Behind ``take``: no step is to follow this snapshot."""
        return self._holding

    def hold(self) -> None:
        """Wait until the agents have brought the snapshot away and the generation is ended, which ``check`` raises."""
        assert self._stage is not None
        self._holding = False
        self._stage.finish()
        until = time.monotonic() + HOLD_SECONDS
        while time.monotonic() < until:
            self._check()
            time.sleep(_BUFFER_SECONDS)

    def wait(self) -> float:
        """Call it before the state changes. Returns the seconds that it waited."""
        assert self._stage is not None
        return self._stage.wait()

    def close(self) -> None:
        """Behind the last step of this generation: a snapshot that is being copied becomes whole."""
        if self._stage is not None:
            self._stage.close()

    def _is_protected(self, state: StateId) -> bool:
        """No writer may touch it: it is what the job would go on from, or may soon be."""
        kept, pinned = (read_state(self._snapshots / name) for name in ("kept.json", "pinned.json"))
        begun = (self._orders.epoch, self._orders.generation, 0)
        # Whatever may be kept next stays: all that came since, or since the one that is on its way.
        oldest = max([begun, *(order(each) for each in (kept, pinned) if each is not None)])
        if order(state) >= oldest or state in (kept, pinned):
            return True
        return state == self._recalled and (kept is None or order(kept) < begun)

    def _header(self, step: int) -> dict[str, Any]:
        """The manifest without files and parent."""
        listing = Listing(
            state=StateId(step, self._orders.epoch, self._orders.generation),
            parent=None,
            files=(),
            layout=Layout(**self._degrees(), data_width=self._layout.data_width),
            sampler=self._sampler.behind(step),
            versions={"lockstep": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
            verified=(
                "loss and gradient norm are finite",
                *(() if self._agreed is None else (f"all ranks agreed on step {self._agreed}",)),
            ),
            written_at=time.time(),
            seconds=0.0,
            model=self._model,
            agreed=self._agreed,
            costs=self._costs,
        )
        return listing.model_dump(mode="json", exclude={"files", "parent"})

    def _degrees(self) -> dict[str, int]:
        names = ("world_size", "replicate", "shard", "context", "tensor", "pipeline", "expert")
        return {name: getattr(self._layout, name) for name in names}

    # ------------------------------------------------------------------------------------------------------------

    def _until_stored(self, call: Callable[[], T]) -> T:
        """Try until the store answers. The agent sees the section and knows that this worker waits."""
        return until_answered(call, lambda error: self._problem(str(error), None), self._check)

    def _problem(self, message: str, step: int | None) -> None:
        log.warning("%s", message)
        if self._ranks.leads:
            self._outbox.event("checkpoint_problem", step=step, message=message)

    def _is_last(self, step: int) -> bool:
        return step == self._job.trainer.recipe.steps
