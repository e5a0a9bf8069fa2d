"""Memory of the cluster's pods and nodes: one paged list, then a watch, trimmed to what plans look at.

A watch can miss a deletion: after every new list what is kept is compared with it by uid.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from lockstep_api import constants
from lockstep_operator.errors import ApiError, ExpiredError
from lockstep_operator.kube import NODES, PODS, KubeClient, Manifest, Resource
from lockstep_operator.plan.observed import Node, Pod
from lockstep_operator.plan.times import unix

log = logging.getLogger(__name__)

T = TypeVar("T")

PAUSE_SECONDS = (0.2, 10.0)
"""First and longest pause after a failed list or watch."""


class Informer(Generic[T]):
    """Keeps ``items``, by uid, equal to what the server has. ``changed`` gets the old and the new one."""

    def __init__(
        self,
        client: KubeClient,
        resource: Resource,
        trim: Callable[[Manifest], T],
        changed: Callable[[T | None, T | None], None],
        *,
        namespace: str | None = None,
        labels: str = "",
    ) -> None:
        self._client, self._trim, self._changed, self._labels = client, trim, changed, labels
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
        page = await self._client.list(self._path, labels=self._labels)
        self.heard = time.monotonic()
        there = {manifest["metadata"]["uid"]: manifest for manifest in page.items}
        for uid in set(self.items) - set(there):
            self._set(uid, None)
        for uid, manifest in there.items():
            self._set(uid, self._trim(manifest))
        return page.resource_version

    async def _watch(self, version: str) -> str:
        async for kind, manifest in self._client.watch(self._path, version, labels=self._labels):
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


class ClusterCache:
    """Pods of all jobs, and nodes. ``wake`` is called with the uid of a job whose pods or nodes changed."""

    def __init__(self, client: KubeClient, namespaces: tuple[str, ...], wake: Callable[[str], None]) -> None:
        self._wake = wake
        self._by_job: dict[str, dict[str, Pod]] = {}  # job uid → pod uid → pod
        scopes: tuple[str | None, ...] = namespaces or (None,)
        self._pod_informers = [
            Informer(client, PODS, trim_pod, self._pod_changed, namespace=namespace, labels=constants.LABEL_JOB_UID)
            for namespace in scopes
        ]
        self._nodes = Informer(client, NODES, trim_node, self._node_changed)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in self._pod_informers:
                group.create_task(informer.run())
            group.create_task(self._nodes.run())

    async def synced(self) -> None:
        """Wait for the first list of pods: planning without it would create pods that are there. Nodes only add
        witnesses, and an operator that may not see them works without."""
        for informer in self._pod_informers:
            await informer.synced.wait()

    def pods(self, job_uid: str) -> tuple[Pod, ...]:
        """Pods of the job."""
        return tuple(self._by_job.get(job_uid, {}).values())

    def nodes(self) -> Mapping[str, Node]:
        """Nodes by name; empty until they were listed."""
        return {node.name: node for node in self._nodes.items.values()}

    def age(self) -> float:
        """Seconds since the pods' watch was last heard."""
        return max(time.monotonic() - informer.heard for informer in self._pod_informers)

    def _pod_changed(self, old: tuple[str, Pod] | None, new: tuple[str, Pod] | None) -> None:
        job_uid, pod = new or old  # type: ignore[misc]  # one of them is set
        pods = self._by_job.setdefault(job_uid, {})
        if new is None:
            pods.pop(pod.uid, None)
            if not pods:
                del self._by_job[job_uid]
        else:
            pods[pod.uid] = pod
        self._wake(job_uid)

    def _node_changed(self, old: Node | None, new: Node | None) -> None:
        name = (new or old).name  # type: ignore[union-attr]  # one of them is set
        for job_uid, pods in self._by_job.items():
            if any(pod.node == name for pod in pods.values()):
                self._wake(job_uid)


def trim_pod(manifest: Manifest) -> tuple[str, Pod]:
    """(job uid, pod)."""
    metadata, spec, status = manifest["metadata"], manifest.get("spec", {}), manifest.get("status", {})
    labels = metadata.get("labels", {})
    statuses = {one["name"]: one for one in status.get("containerStatuses", [])}
    container = statuses.get(constants.CONTAINER_NAME, {})
    state = container.get("state", {})
    waiting = state.get("waiting", {})
    conditions = {one["type"]: one for one in status.get("conditions", [])}
    scheduled = conditions.get("PodScheduled", {})
    unscheduled = scheduled.get("message", "") if scheduled.get("status") == "False" else ""
    port = metadata.get("annotations", {}).get(constants.ANNOTATION_AGENT_PORT, constants.AGENT_PORT)
    address = status.get("podIP", "")
    host = f"[{address}]" if ":" in address else address
    return labels[constants.LABEL_JOB_UID], Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        ordinal=_number(labels.get(constants.LABEL_ORDINAL)) or 0,
        incarnation=_number(labels.get(constants.LABEL_INCARNATION)) or 0,
        phase=status.get("phase", "Pending"),
        created=unix(metadata["creationTimestamp"]),
        node=spec.get("nodeName", ""),
        address=f"{host}:{port}" if address else "",
        deleting="deletionTimestamp" in metadata,
        restarts=container.get("restartCount", 0),
        running="running" in state,
        waiting=waiting.get("reason", ""),
        message=status.get("message") or waiting.get("message") or unscheduled or status.get("reason", ""),
        slot=_number(labels.get(constants.LABEL_SLOT)),
        epoch=_number(labels.get(constants.LABEL_EPOCH)),
        role=labels.get(constants.LABEL_ROLE, ""),
    )


def trim_node(manifest: Manifest) -> Node:
    """Its condition, and whether it was declared out of service."""
    conditions = {one["type"]: one["status"] for one in manifest.get("status", {}).get("conditions", [])}
    taints = {taint["key"] for taint in manifest.get("spec", {}).get("taints", [])}
    return Node(
        name=manifest["metadata"]["name"],
        ready=conditions.get("Ready") == "True" and "node.kubernetes.io/unreachable" not in taints,
        out_of_service="node.kubernetes.io/out-of-service" in taints,
    )


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
