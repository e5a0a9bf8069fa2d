"""Step folders as a job writes them: staged by every rank, then brought to the store from the staged copies."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forked import run_ranks
from lockstep_api.messages import StateId, Term
from lockstep_trainer.agreement import from_all
from lockstep_trainer.checkpoint.manifest import FileEntry
from lockstep_trainer.checkpoint.planning import plan_snapshots
from lockstep_trainer.checkpoint.snapshots import Root
from lockstep_trainer.checkpoint.stage import Facts, Stage
from lockstep_trainer.checkpoint.upload import upload_rank
from lockstep_trainer.storage import ObjectStore

FIRST = StateId(1, 1, 1)


def store_state(
    state: Mapping[str, Any], store: ObjectStore, *, at: StateId = FIRST, samples: str | None = None
) -> tuple[FileEntry, ...]:
    """Write the step folder of ``at``; all ranks of the default group call it and get the files of all of them.

    ``samples`` is the text of this rank's sample log.
    """
    rank = dist.get_rank()
    planned = plan_snapshots(state, {}, rank=rank, group=None)
    name = f"samples-r{rank}.jsonl" if samples is not None else None
    facts = Facts(at, {"state": asdict(at)}, Root(Term(at.epoch, at.generation), None), 0, name, samples or "")
    with tempfile.TemporaryDirectory(prefix="staged-") as folder:
        stage = Stage(Path(folder), planned, torch.device("cpu"))
        assert stage.reserve(lambda _: False)
        stage.begin(planned.sources(state), facts)
        stage.finish()
        uploaded = upload_rank(Path(folder), at, None, store)
    files = [file for each in from_all(uploaded.files, None) for file in each]
    return tuple(FileEntry(**asdict(file)) for file in sorted(files, key=lambda file: file.name))


def store_from_ranks(
    ranks: int,
    make: Callable[[int], Mapping[str, Any]],
    store: ObjectStore,
    *,
    at: StateId = FIRST,
    samples: str | None = None,
) -> tuple[FileEntry, ...]:
    """The same from a test: ``make(rank)`` is what each of ``ranks`` forked processes has."""
    with tempfile.TemporaryDirectory(prefix="stored-") as folder:
        listing = Path(folder) / "files"

        def body(rank: int) -> None:
            files = store_state(make(rank), store, at=at, samples=samples)
            if rank == 0:
                listing.write_bytes(pickle.dumps(files))

        run_ranks(ranks, body)
        found: tuple[FileEntry, ...] = pickle.loads(listing.read_bytes())
    return found
