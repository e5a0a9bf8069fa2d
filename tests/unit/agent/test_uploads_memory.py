"""An upload that fails lets go of its buffer at once: an agent whose store is away tries for hours, and what the
tracebacks hold would keep each try's mapping, and a descriptor with it, until a collection comes by."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import pytest

from lockstep_api.messages import StateId, Term
from lockstep_trainer.agent import uploads as module
from lockstep_trainer.agent.settings import Job
from lockstep_trainer.agent.uploads import Uploads
from lockstep_trainer.checkpoint.snapshots import rank_folder
from lockstep_trainer.errors import StoreError
from lockstep_trainer.protocol.effects import UploadState
from lockstep_trainer.protocol.events import Event, UploadFailed
from lockstep_trainer.storage import open_store
from unit.agent.test_copies import stage

JOB = Job(name="job", namespace="default", uid="uid", spec={"nodes": 1, "gpusPerNode": 1})


def mapped(folder: Path) -> int:
    """Buffers of the folder that this process has open or mapped."""
    links = [path.name for path in Path("/proc/self/fd").iterdir()]
    opened = [os.readlink(f"/proc/self/fd/{name}") for name in links if os.path.islink(f"/proc/self/fd/{name}")]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum(f"{folder}/buffer-" in line for line in [*opened, *maps])


def test_a_failed_try_keeps_nothing_of_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0.01,))
    store = open_store(f"file://{tmp_path}/store")

    def away(*_: object, **__: object) -> None:
        raise StoreError("the store is away", temporary=True)

    monkeypatch.setattr(store, "put_buffer", away)
    folder = rank_folder(tmp_path / "snapshots", 0)
    stage(tmp_path / "snapshots", 0, 5)

    async def main() -> None:
        told: list[Event] = []
        uploads = Uploads(JOB, tmp_path / "snapshots", told.append)
        uploads._store = store
        uploads.order(UploadState(Term(1, 1), StateId(5, 1, 1), None), 0)
        async with asyncio.timeout(20):
            while sum(isinstance(one, UploadFailed) for one in told) < 5:
                await asyncio.sleep(0.01)
        task = uploads._task
        assert task is not None
        uploads.close()
        await asyncio.gather(task, return_exceptions=True)
        assert all("the store is away" in one.problem for one in told if isinstance(one, UploadFailed))

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
        assert mapped(folder) == 0
    finally:
        gc.enable()
