"""Memory of the cluster's pods and nodes, trimmed to what plans look at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from lockstep_api import constants
from lockstep_operator.informer import Informer
from lockstep_operator.kube import NODES, PODS, KubeClient, Manifest
from lockstep_operator.plan.children import controlled_by
from lockstep_operator.plan.nodes import notices
from lockstep_operator.plan.observed import Node, Pod
from lockstep_operator.plan.times import unix

UNFIT_CHARACTERS = 1000
"""Of what preflight checks found: an event holds 1024 bytes, a status keeps ten faults; the pod's log has it all."""


JobKey = tuple[str, str]
"""(namespace, uid) of a job."""


class ClusterCache:
    """Pods of all jobs, and nodes. ``wake`` is called with the uid of a job whose pods or nodes changed,
    ``nodes_changed`` when any node did."""

    def __init__(self, client: KubeClient, namespaces: tuple[str, ...]) -> None:
        self.wake: Callable[[str], None] = lambda uid: None
        self.nodes_changed: Callable[[], None] = lambda: None
        self._by_job: dict[JobKey, dict[str, Pod]] = {}  # job → pod uid → pod
        scopes: tuple[str | None, ...] = namespaces or (None,)
        self._pod_informers = [
            Informer(client, PODS, job_pod, self._pod_changed, namespace=namespace, labels=constants.LABEL_JOB_UID)
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

    def pods(self, namespace: str, job_uid: str) -> tuple[Pod, ...]:
        """Pods of the job."""
        return tuple(self._by_job.get((namespace, job_uid), {}).values())

    def nodes(self) -> Mapping[str, Node]:
        """Nodes by name; empty until they were listed."""
        return {node.name: node for node in self._nodes.items.values()}

    def age(self) -> float:
        """Seconds since the pods' watch was last heard."""
        return max(time.monotonic() - informer.heard for informer in self._pod_informers)

    def _pod_changed(self, old: tuple[JobKey, Pod] | None, new: tuple[JobKey, Pod] | None) -> None:
        job, pod = new or old  # type: ignore[misc]  # one of them is set
        pods = self._by_job.setdefault(job, {})
        if new is None:
            pods.pop(pod.uid, None)
            if not pods:
                del self._by_job[job]
        else:
            pods[pod.uid] = pod
        self.wake(job[1])

    def _node_changed(self, old: Node | None, new: Node | None) -> None:
        name = (new or old).name  # type: ignore[union-attr]  # one of them is set
        self.nodes_changed()
        for (_, job_uid), pods in self._by_job.items():
            if any(pod.node == name for pod in pods.values()):
                self.wake(job_uid)


def job_pod(manifest: Manifest) -> tuple[JobKey, Pod] | None:
    """(job, pod); None where no job made the pod. Whoever may create pods, in a namespace of their own even, may give
    them a job's label: only the owner reference binds, and it reaches no other namespace."""
    job_uid, pod = trim_pod(manifest)
    metadata = manifest["metadata"]
    return ((metadata["namespace"], job_uid), pod) if controlled_by(manifest, job_uid) else None


def trim_pod(manifest: Manifest) -> tuple[str, Pod]:
    """(job uid, pod)."""
    metadata, spec, status = manifest["metadata"], manifest.get("spec", {}), manifest.get("status", {})
    labels = metadata.get("labels", {})
    containers = spec.get("containers", [])
    statuses = {one["name"]: one for one in status.get("containerStatuses", [])}
    container = statuses.get(constants.CONTAINER_NAME, {})
    state = container.get("state", {})
    waiting = state.get("waiting", {})
    conditions = {one["type"]: one for one in status.get("conditions", [])}
    scheduled = conditions.get("PodScheduled", {})
    unscheduled = scheduled.get("message", "") if scheduled.get("status") == "False" else ""
    disrupted = conditions.get("DisruptionTarget", {})
    annotations = metadata.get("annotations", {})
    port = annotations.get(constants.ANNOTATION_AGENT_PORT, constants.AGENT_PORT)
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
        deleted_at=_deleted_at(metadata),
        disruption=disrupted.get("reason", "") if disrupted.get("status") == "True" else "",
        refused=_refused(status),
        unfit=_unfit(container),
        bad_device=_bad_device(container),
        restarts=container.get("restartCount", 0),
        running="running" in state,
        waiting=waiting.get("reason", ""),
        message=status.get("message") or waiting.get("message") or unscheduled or status.get("reason", ""),
        slot=_number(labels.get(constants.LABEL_SLOT)),
        epoch=_number(labels.get(constants.LABEL_EPOCH)),
        role=labels.get(constants.LABEL_ROLE, ""),
        tls=annotations.get(constants.ANNOTATION_TLS) == "on",
        image=next((one.get("image", "") for one in containers if one["name"] == constants.CONTAINER_NAME), ""),
        image_id=container.get("imageID", ""),
    )


def trim_node(manifest: Manifest) -> Node:
    """Its conditions, taints and GPUs."""
    spec, status = manifest.get("spec", {}), manifest.get("status", {})
    conditions = {one["type"]: one["status"] for one in status.get("conditions", [])}
    taints = {taint["key"]: taint.get("value", "") for taint in spec.get("taints", [])}
    return Node(
        name=manifest["metadata"]["name"],
        ready=conditions.get("Ready") == "True" and "node.kubernetes.io/unreachable" not in taints,
        out_of_service=not notices.OUT_OF_SERVICE.isdisjoint(taints),
        cordoned=bool(spec.get("unschedulable")),
        leaving=notices.leaving(taints, conditions),
        sick=notices.sick(taints, conditions),
        gpus=_gpus(status.get("capacity", {})),
        gpus_healthy=_gpus(status.get("allocatable", {})),
        taint=taints.get(constants.TAINT_EXCLUDED),
        marked=conditions.get(constants.NODE_CONDITION_EXCLUDED, ""),
    )


def _deleted_at(metadata: Manifest) -> float | None:
    """When its deletion was asked for: the timestamp is when the time of grace will have passed."""
    if "deletionTimestamp" not in metadata:
        return None
    return unix(metadata["deletionTimestamp"]) - float(metadata.get("deletionGracePeriodSeconds") or 0)


def _refused(status: Manifest) -> str:
    """Why the kubelet did not admit the pod, as OutOfcpu, UnexpectedAdmissionError or TopologyAffinityError: it failed
    and there is no word of any container. One that fails later has told of its containers."""
    told = status.get("containerStatuses") or status.get("initContainerStatuses")
    if status.get("phase") != "Failed" or told:
        return ""
    return ": ".join(filter(None, (status.get("reason"), status.get("message")))) or "no reason is given"


def _unfit(container: Manifest) -> str:
    """What its preflight checks found, if its container ended for that; it may have been started again since."""
    for state in ("state", "lastState"):
        ended = container.get(state, {}).get("terminated", {})
        if ended.get("exitCode") == constants.PREFLIGHT_EXIT_CODE:
            return ended.get("message", "").strip()[:UNFIT_CHARACTERS] or "its preflight checks failed"
    return ""


def _bad_device(container: Manifest) -> str:
    """A device of the container that its plugin calls unhealthy (Kubernetes 1.36 and newer tell: KEP-4680)."""
    devices = (one for status in container.get("allocatedResourcesStatus", []) for one in status.get("resources", []))
    return next((device.get("resourceID", "") for device in devices if device.get("health") == "Unhealthy"), "")


def _gpus(resources: Manifest) -> int:
    """GPUs of any vendor; partitions of one are not counted, since they come and go with its configuration."""
    return sum(int(count) for name, count in resources.items() if name.endswith("/gpu"))


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
