"""All jobs: one controller each, started and ended as the objects come and go. Jobs never wait for each other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress

import aiohttp
from pydantic import ValidationError

from lockstep_api import constants
from lockstep_api.v1alpha1 import Phase, TrainingJob
from lockstep_operator.backends.kubernetes import KubernetesBackend
from lockstep_operator.controller import JobController, Reporter
from lockstep_operator.errors import ApiError
from lockstep_operator.kube import JSON_PATCH, TRAINING_JOBS, KubeClient, Manifest
from lockstep_operator.links import Links
from lockstep_operator.plan.times import rfc3339

log = logging.getLogger(__name__)

PARALLEL_POD_CREATIONS = 64
"""Pods created at the same time, over all jobs: enough to keep an API server busy, few enough not to flood it."""
PARALLEL_PROBES = 64
RELIST_SECONDS = 60.0
"""Jobs are listed so often, since a deletion that a broken watch missed is never told again."""


class Jobs:
    """Keeps the controllers."""

    def __init__(self, client: KubeClient, namespaces: tuple[str, ...], backend: KubernetesBackend) -> None:
        self._client, self._namespaces, self._backend = client, namespaces, backend
        self._running: dict[str, tuple[JobController, asyncio.Task[None]]] = {}
        self._pod_creations = asyncio.Semaphore(PARALLEL_POD_CREATIONS)
        self._probes = asyncio.Semaphore(PARALLEL_PROBES)
        self._session: aiohttp.ClientSession | None = None
        self._refused: dict[str, int] = {}  # job uid → generation whose spec was refused
        self.reporter: Reporter | None = None

    def known(self) -> Iterable[TrainingJob]:
        """The jobs as their controllers know them."""
        return [controller.job for controller, _ in self._running.values()]

    def wake(self, uid: str) -> None:
        """Something about the job's pods or nodes changed."""
        if uid in self._running:
            self._running[uid][0].wake()

    async def changed(self, manifest: Manifest) -> None:
        """The job was added or changed."""
        metadata = manifest["metadata"]
        uid: str = metadata["uid"]
        if metadata.get("deletionTimestamp") or manifest["spec"].get("managedBy") not in (None, constants.MANAGED_BY):
            await self.gone(uid)
            return
        try:
            job = TrainingJob.of_server(manifest)
        except ValidationError as error:
            await self._refuse(manifest, error)
            return
        if uid in self._running:
            self._running[uid][0].update(job)
            return
        controller = JobController(
            job,
            self._backend,
            lambda changed: Links(
                self._http(),
                self._backend.credentials.token(uid),
                changed,
                self._probes,
                tls=self._backend.credentials.context(uid),
            ),
            pod_creations=self._pod_creations,
            reporter=self.reporter,
        )
        controller.wake()
        task = asyncio.create_task(controller.run(), name=f"{job.namespace}/{job.name}")
        self._running[uid] = (controller, task)

    async def gone(self, uid: str) -> None:
        """The job was deleted, or is another controller's. Its pods follow it by their owner references."""
        if uid in self._running:
            _, task = self._running.pop(uid)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self._refused.pop(uid, None)

    async def relist(self) -> None:
        """Compare with the server's list from time to time, until cancelled."""
        while True:
            await asyncio.sleep(RELIST_SECONDS)
            try:
                there: dict[str, Manifest] = {}
                for namespace in self._namespaces or (None,):
                    page = await self._client.list(TRAINING_JOBS.path(namespace))
                    there |= {manifest["metadata"]["uid"]: manifest for manifest in page.items}
            except ApiError as error:
                log.warning("jobs could not be listed: %s", error)
                continue
            for uid in set(self._running) - set(there):
                await self.gone(uid)
            for manifest in there.values():
                await self.changed(manifest)

    async def close(self) -> None:
        """End all controllers; jobs go on without."""
        for uid in list(self._running):
            await self.gone(uid)
        if self._session:
            await self._session.close()

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Agents are reached directly at their pods' addresses: never by a proxy of the environment.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False)
        return self._session

    async def _refuse(self, manifest: Manifest, error: ValidationError) -> None:
        """A spec that passed the API server and still can't be read: say so, once per generation."""
        metadata = manifest["metadata"]
        generation = metadata.get("generation", 1)
        terminal = manifest.get("status", {}).get("phase") in (Phase.SUCCEEDED, Phase.FAILED)
        if terminal or self._refused.get(metadata["uid"]) == generation:
            return
        self._refused[metadata["uid"]] = generation
        first = error.errors()[0]
        message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        now = rfc3339(time.time())
        condition = {
            "type": constants.CONDITION_FAILED,
            "status": "True",
            "reason": "InvalidSpec",
            "message": message,
            "lastTransitionTime": now,
            "observedGeneration": generation,
        }
        status = {"phase": Phase.FAILED, "completionTime": now, "conditions": [condition]}
        patch = [
            {"op": "replace", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]},
            {"op": "add", "path": "/status", "value": status},
        ]
        path = TRAINING_JOBS.path(metadata["namespace"], metadata["name"], "status")
        try:
            await self._client.patch(path, patch, JSON_PATCH)
        except ApiError as failure:
            self._refused.pop(metadata["uid"], None)
            log.warning("%s: %s", metadata["name"], failure)
