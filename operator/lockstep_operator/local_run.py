"""Runs one job on this machine, without a cluster: the same plan, the same agents, processes instead of pods."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import aiohttp

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.backends.local import LocalBackend
from lockstep_operator.controller import JobController
from lockstep_operator.credentials import Credentials
from lockstep_operator.links import Links
from lockstep_operator.plan.actions import Event

log = logging.getLogger(__name__)

PARALLEL_STARTS = 16
PARALLEL_PROBES = 16


async def run(
    job: TrainingJob,
    *,
    state_dir: Path,
    on_status: Callable[[TrainingJobStatus], None],
    on_event: Callable[[Event], None] = lambda event: None,
    credentials: Credentials | None = None,
    fault_injection: bool = False,
) -> TrainingJobStatus:
    """Run ``job`` to its end and return its last status. ``on_status`` and ``on_event`` are called from the event loop
    as they come; what ``on_status`` raises is logged. ``state_dir`` is made if need be; what is in it stays. Cancelling
    ends every process that was started before the cancellation is passed on. ``credentials`` are what the parts prove
    with who they are; by default they are made for this run. ``fault_injection``: faults may be made on purpose."""
    state_dir = state_dir.resolve()
    state_dir.mkdir(parents=True, exist_ok=True)
    job = job.model_copy(
        update={"metadata": {"uid": str(uuid.uuid4()), "generation": 1, **job.metadata}, "status": TrainingJobStatus()}
    )
    ended = asyncio.Event()
    last = job.status

    def follow(status: TrainingJobStatus) -> None:
        nonlocal last
        last = status
        try:
            on_status(status)
        except Exception:  # the run does not end because it can't be shown, and the controller knows nothing of it
            log.exception("%s: its status can't be shown", job.name)
        if status.phase and status.phase.terminal:
            ended.set()

    backend = LocalBackend(state_dir, follow, on_event, credentials=credentials, fault_injection=fault_injection)
    async with aiohttp.ClientSession() as session:
        controller = JobController(
            job,
            backend,
            lambda changed: Links(
                session,
                backend.credentials.token(job.uid),
                changed,
                asyncio.Semaphore(PARALLEL_PROBES),
                tls=backend.credentials.context(job.uid),
            ),
            pod_creations=asyncio.Semaphore(PARALLEL_STARTS),
        )
        backend.changed = controller.wake
        loop = asyncio.create_task(controller.run(), name=f"controller {job.name}")
        try:
            waiting = asyncio.create_task(ended.wait())
            await asyncio.wait({waiting, loop}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if loop.done():
                loop.result()
        finally:
            loop.cancel()
            with suppress(asyncio.CancelledError):
                await loop
            await asyncio.shield(backend.close())
    return last
