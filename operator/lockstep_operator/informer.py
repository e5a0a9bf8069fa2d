"""What the API server has of one kind of object: one paged list, then a watch.

A watch can miss a deletion: after every new list what is kept is compared with it by uid.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from lockstep_operator.errors import ApiError, ExpiredError
from lockstep_operator.kube import KubeClient, Manifest, Resource

log = logging.getLogger(__name__)

T = TypeVar("T")

PAUSE_SECONDS = (0.2, 10.0)
"""First and longest pause after a failed list or watch."""


class Informer(Generic[T]):
    """Keeps ``items``, by uid, equal to what the server has. ``changed`` gets the old and the new one. What ``trim``
    makes nothing of is passed over."""

    def __init__(
        self,
        client: KubeClient,
        resource: Resource,
        trim: Callable[[Manifest], T | None],
        changed: Callable[[T | None, T | None], None],
        *,
        namespace: str | None = None,
        labels: str = "",
        fields: str = "",
    ) -> None:
        self._client, self._trim, self._changed = client, trim, changed
        self._labels, self._fields = labels, fields
        self._path = resource.path(namespace)
        self.items: dict[str, T] = {}
        self.synced = asyncio.Event()
        self.heard = time.monotonic()
        """When the server was last heard, for the watch's age."""

    async def run(self) -> None:
        """Until cancelled."""
        version, pause = "", PAUSE_SECONDS[0]
        while True:
            try:
                if not version:
                    version = await self._list()
                    self.synced.set()
                version = await self._watch(version)
                pause = PAUSE_SECONDS[0]
                continue
            except ExpiredError:
                version = ""
                continue
            except ApiError as error:
                log.warning("%s: %s", self._path, error)
                version = ""  # what was missed meanwhile only a list can tell
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS[1])

    async def _list(self) -> str:
        page = await self._client.list(self._path, labels=self._labels, fields=self._fields)
        self.heard = time.monotonic()
        there = {manifest["metadata"]["uid"]: manifest for manifest in page.items}
        for uid in set(self.items) - set(there):
            self._set(uid, None)
        for uid, manifest in there.items():
            self._set(uid, self._trim(manifest))
        return page.resource_version

    async def _watch(self, version: str) -> str:
        async for kind, manifest in self._client.watch(self._path, version, labels=self._labels, fields=self._fields):
            self.heard = time.monotonic()
            version = manifest["metadata"]["resourceVersion"]
            if kind != "BOOKMARK":
                self._set(manifest["metadata"]["uid"], None if kind == "DELETED" else self._trim(manifest))
        self.heard = time.monotonic()
        return version

    def _set(self, uid: str, new: T | None) -> None:
        old = self.items.get(uid)
        if old == new:
            return
        if new is None:
            del self.items[uid]
        else:
            self.items[uid] = new
        self._changed(old, new)
