"""Lockstep's worker: a snapshot beside the next step, brought to the store by the agent; and every way back."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep_api.messages import StateId
from lockstep_trainer import __version__
from lockstep_trainer.agreement import by_first
from lockstep_trainer.checkpoint.chain import Chain
from lockstep_trainer.checkpoint.manifest import Layout, Listing, Manifest
from lockstep_trainer.checkpoint.planning import plan_snapshots
from lockstep_trainer.checkpoint.recall import recall
from lockstep_trainer.checkpoint.snapshots import FOLDER, Root, rank_folder
from lockstep_trainer.checkpoint.stage import Cost, Facts, Stage
from lockstep_trainer.checkpoint.state import load_state
from samplerstates import sampler_state

from .agent import JOB, TERM
from .store import Server
from .training import CPU, Training


class Lockstep:
    """As the keeper drives it, without data."""

    name = "Lockstep"
    first_saves = 3  # each buffer is made at its first use

    def __init__(self, training: Training, run: Path, server: Server, line: Connection | None) -> None:
        """``line`` to the agent: rank 0's."""
        self._training, self._run, self._server, self._line = training, run, server, line
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._control = dist.new_group()
        begun = time.perf_counter()
        degrees = {"world_size": self._ranks, "shard": self._ranks}
        self.planned = plan_snapshots(training.state(), degrees, rank=self._rank, group=self._control)
        self.planning = time.perf_counter() - begun
        self._stage = Stage(rank_folder(run / FOLDER, self._rank), self.planned, CPU)
        self.newest: StateId | None = None
        self.durable_at: float | None = None

    @property
    def cost(self) -> Cost | None:
        """Of the newest snapshot, as the worker measures it."""
        return self._stage.cost

    def begin(self, number: int) -> None:
        """At a boundary."""
        begun = time.perf_counter()
        newest, state = self.newest, StateId(number, TERM.epoch, TERM.generation)
        if not self._stage.reserve(lambda held: held == newest):
            raise RuntimeError("no buffer is free")
        facts = Facts(state, self._header(state), Root(TERM, None), 0, f"samples-r{self._rank}.jsonl", "")
        self._stage.begin(self.planned.sources(self._training.state()), facts, begun=begun)
        self.newest, self.durable_at = state, None
        if self._line is not None:
            self._line.send(("upload", state))

    def wait(self) -> None:
        """Before the state changes."""
        self._stage.wait()

    def done(self) -> bool:
        """Whether it is durable, as far as this rank has to say."""
        if self._line is None:
            return True
        if self.durable_at is None and self._line.poll():
            self.durable_at = self._line.recv()
        return self.durable_at is not None

    def finish(self) -> None:
        """Wait until it is durable."""
        self._stage.finish()
        if self._line is not None and self.durable_at is None:
            self.durable_at = self._line.recv()
        dist.barrier(group=self._control)

    def close(self) -> None:
        """Nothing to end."""

    # --- back -------------------------------------------------------------------------------------------------------

    def from_memory(self) -> None:
        """The rank's own buffer."""
        self._recall(self._run)

    def from_buddy(self, fetch: Callable[[], None], fetched: Path) -> None:
        """``fetch`` on rank 0 brings the copies back; then as from own memory."""
        if self._rank == 0:
            fetch()
        dist.barrier(group=self._control)
        self._recall(fetched)

    def restore(self) -> None:
        """From the store: pointer, manifest and data."""
        chain = Chain(self._server.store(), JOB)

        def read() -> Manifest:
            point = chain.latest().point
            assert point is not None
            return chain.manifest(point)

        manifest = by_first(read, self._control)
        load_state(self._training.state(), chain.store, manifest.folder, manifest, group=self._control)

    def _recall(self, run: Path) -> None:
        assert self.newest is not None
        recall(
            rank_folder(run / FOLDER, self._rank),
            self.planned,
            self.newest,
            self.planned.sources(self._training.state()),
        )

    def _header(self, state: StateId) -> dict[str, object]:
        listing = Listing(
            state=state,
            parent=None,
            files=(),
            layout=Layout(world_size=self._ranks, shard=self._ranks, data_width=self._ranks),
            sampler=sampler_state(state.step),
            versions={"lockstep": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
            verified=(),
            written_at=time.time(),
            seconds=0.0,
        )
        return listing.model_dump(mode="json", exclude={"files", "parent"})


class Transfer:
    """Nothing but the put of the newest snapshot's bytes, beside the same steps: what the machine itself can do."""

    name = "raw put beside steps"
    first_saves = 1

    def __init__(self, of: Lockstep, line: Connection | None) -> None:
        self._of, self._line = of, line
        self._begun = 0.0
        self.durable_at: float | None = None

    def begin(self, number: int) -> None:
        """Order it."""
        self._begun, self.durable_at = time.perf_counter(), None
        if self._line is not None:
            self._line.send(("raw", self._of.newest))

    def wait(self) -> None:
        """Nothing of the state is read."""

    def done(self) -> bool:
        """Whether all bytes are there."""
        if self._line is None:
            return True
        if self.durable_at is None and self._line.poll():
            begun, ended = self._line.recv()
            self.durable_at = self._begun + ended - begun  # without the checksums, which a snapshot has already
        return self.durable_at is not None

    def close(self) -> None:
        """Nothing to end."""
