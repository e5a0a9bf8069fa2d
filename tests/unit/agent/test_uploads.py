"""While a state is brought to the store, workers know which it is: they overwrite it last."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lockstep_api.messages import StateId, Term
from lockstep_trainer.agent import uploads as module
from lockstep_trainer.agent.settings import Job
from lockstep_trainer.agent.uploads import Uploads
from lockstep_trainer.checkpoint.snapshots import UPLOADING, read_state
from lockstep_trainer.errors import StoreError
from lockstep_trainer.protocol.effects import UploadState
from lockstep_trainer.protocol.events import Event, StateUploaded, UploadFailed
from lockstep_trainer.storage import open_store
from unit.agent.test_copies import stage

JOB = Job(name="job", namespace="default", uid="uid", spec={"nodes": 1, "gpusPerNode": 1})


def order(step: int) -> UploadState:
    return UploadState(Term(1, 1), StateId(step, 1, 1), None)


def test_the_state_is_marked_until_it_is_uploaded_or_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0.01,))
    store = open_store(f"file://{tmp_path}/store")
    real, left = store.put_buffer, [1]

    def put(*of: Any, **how: Any) -> None:
        if left:
            left.pop()
            raise StoreError("busy", temporary=True)
        real(*of, **how)

    monkeypatch.setattr(store, "put_buffer", put)
    root = tmp_path / "snapshots"
    for number, step in enumerate((5, 6)):
        stage(root, 0, step, number=number)

    async def run() -> None:
        told: asyncio.Queue[Event] = asyncio.Queue()
        marked: list[StateId | None] = []

        def tell(event: Event) -> None:
            marked.append(read_state(root / UPLOADING))
            told.put_nowait(event)

        uploads = Uploads(JOB, root, tell)
        uploads._store = store
        uploads.order(order(5), 0)
        assert isinstance(await told.get(), UploadFailed)
        assert isinstance(await told.get(), StateUploaded)
        assert marked == [StateId(5, 1, 1), None], "in the pause, and behind it"
        uploads.order(order(6), 0)
        uploads.order(order(7), 0)
        assert read_state(root / UPLOADING) == StateId(7, 1, 1)
        failed = await told.get()
        assert isinstance(failed, UploadFailed)
        assert failed.gone
        assert marked[-1] is None
        uploads.order(order(6), 0)
        uploads.stop()
        assert read_state(root / UPLOADING) is None
        uploads.close()

    asyncio.run(run())
