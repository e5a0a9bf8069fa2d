"""The agent's and the leader's part in checkpoints, for tests of whole workers: keeps what is staged, commits it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forked import run_workers, start_all, wait_all
from lockstep_api.messages import RestorePoint, StateId, Term
from lockstep_api.v1alpha1 import TrainingJobSpec
from lockstep_trainer.checkpoint.chain import Chain
from lockstep_trainer.checkpoint.snapshots import (
    FOLDER,
    NoSnapshotError,
    held,
    order,
    rank_folder,
    read_state,
    write_state,
)
from lockstep_trainer.checkpoint.upload import listing_of, upload_rank

_POLL_SECONDS = 0.005


def snapshots_of(folder: Path) -> Path:
    """The snapshots of the run that this worker's folder belongs to."""
    return folder.parent.parent / FOLDER


def staged_states(folder: Path) -> list[StateId]:
    """States of this worker's generation that all its ranks have whole, the oldest first."""
    orders = json.loads((folder / "start.json").read_text())
    root = snapshots_of(folder)
    ranks = [
        {snapshot.state for snapshot in held(rank_folder(root, rank)).values()} for rank in range(orders["world_size"])
    ]
    term = (orders["epoch"], orders["generation"])
    common = set.intersection(*ranks)
    return sorted((state for state in common if (state.epoch, state.generation) == term), key=order)


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Says, as an agent does, which state is the one to keep, as long as the body runs."""

    def keep() -> None:
        path = snapshots_of(folder) / "kept.json"
        while True:
            states = staged_states(folder)
            if states and states[-1] != read_state(path):
                write_state(path, states[-1])
            time.sleep(_POLL_SECONDS)

    (pid,) = start_all([keep])
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_all([pid])


def run_kept(folders: list[Path]) -> list[int]:
    """``run_workers`` with somebody who keeps what they stage."""
    with keeping(folders[0]):
        return run_workers(folders)


def commit_staged(chain: Chain, folder: Path, step: int, term: Term, deadline: float = 60) -> RestorePoint:
    """Waits until all ranks have staged a state of ``step`` or later, uploads and commits it."""
    while True:
        try:
            return _commit(chain, folder, until_staged(folder, step, deadline), term)
        except NoSnapshotError:  # overwritten meanwhile: a later one is there
            continue


def until_staged(folder: Path, step: int, deadline: float = 60) -> StateId:
    """The oldest state of ``step`` or later that all ranks have staged, once there is one."""
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        for state in staged_states(folder):
            if state.step >= step:
                return state
        time.sleep(_POLL_SECONDS)
    raise AssertionError(f"step {step} was not staged: {(folder / 'output.log').read_text()[-2000:]}")


def _commit(chain: Chain, folder: Path, state: StateId, term: Term) -> RestorePoint:
    root = snapshots_of(folder)
    world = json.loads((folder / "start.json").read_text())["world_size"]
    parent = chain.latest().point
    uploads = [upload_rank(rank_folder(root, rank), state, parent, chain.store) for rank in range(world)]
    header = uploads[0].header
    assert header is not None
    point = chain.commit(listing_of(header, parent, [file for each in uploads for file in each.files]), term, "test")
    write_state(root / "durable.json", point.state)
    return point


def small_job(root: Path, steps: int, resilience: dict[str, Any]) -> Path:
    """A job of two ranks and a tiny decoder, in a folder that is made for it; the file that workers are given."""
    root.mkdir()
    spec = TrainingJobSpec.model_validate(
        {
            "nodes": 1,
            "gpusPerNode": 2,
            "trainer": {
                "model": {"preset": "llama-debug", "overrides": {"dim": 32, "layers": 2, "ffn_dim": 64}},
                "tokenizer": {"train": {"vocabSize": 320}},
                "data": {"sources": [{"uri": "file://{stdlib}/email/**/*.py"}], "sequenceLength": 16},
                "recipe": {"steps": steps, "globalBatchTokens": 128, "precision": "fp32", "optimizer": {"lr": 0.01}},
            },
            "checkpoint": {"uri": f"file://{root}/store", "every": steps},
            "resilience": resilience,
        }
    )
    path = root / "job.json"
    path.write_text(json.dumps({"name": "job", "namespace": "ns", "uid": "uid", "spec": spec.to_wire()}))
    return path
