"""Pods in a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Mapping

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.cache import ClusterCache
from lockstep_operator.credentials import Credentials
from lockstep_operator.errors import AlreadyExistsError, NotRenewedError, RefusedError
from lockstep_operator.events import EventPoster
from lockstep_operator.kube import (
    CONFIG_MAPS,
    JSON_PATCH,
    PODS,
    SECRETS,
    SERVICES,
    TRAINING_JOBS,
    KubeClient,
    Resource,
)
from lockstep_operator.nodememory import NodeMemory
from lockstep_operator.plan import children, pods
from lockstep_operator.plan.actions import ChildKind, DeletePod, Event, LabelPod, NewPod
from lockstep_operator.plan.observed import Node, Pod

_CHILDREN: dict[ChildKind, Resource] = {"Service": SERVICES, "Secret": SECRETS, "ConfigMap": CONFIG_MAPS}


class KubernetesBackend:
    """All jobs of a cluster, or of some of its namespaces."""

    def __init__(
        self,
        client: KubeClient,
        cache: ClusterCache,
        *,
        memory: NodeMemory,
        events: EventPoster,
        defaults: pods.PodDefaults,
        credentials: Credentials,
    ) -> None:
        self._client, self._cache, self._memory, self._events = client, cache, memory, events
        self._defaults, self.credentials, self.tls = defaults, credentials, defaults.tls

    def pods(self, job: TrainingJob) -> tuple[Pod, ...]:
        """From the cache."""
        return self._cache.pods(job.namespace, job.uid)

    def nodes(self) -> Mapping[str, Node]:
        """From the cache."""
        return self._cache.nodes()

    def excluded(self) -> frozenset[str]:
        """From the memory of nodes."""
        return self._memory.excluded()

    def learn(self, job: TrainingJob) -> None:
        """Into the memory of nodes."""
        self._memory.learn(job)

    async def write_status(self, job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        """The whole status is replaced: a merge would keep slots that are vacant now. Naming the version that was read
        makes the server refuse the patch (409) if the job has changed since."""
        patch = [
            {"op": "replace", "path": "/metadata/resourceVersion", "value": job.metadata["resourceVersion"]},
            {"op": "add", "path": "/status", "value": status.to_wire()},
        ]
        path = TRAINING_JOBS.path(job.namespace, job.name, "status")
        return TrainingJob.of_server(await self._client.patch(path, patch, JSON_PATCH))

    async def create_child(self, job: TrainingJob, kind: ChildKind) -> None:
        """Service, Secret or ConfigMap. A Secret that is there is replaced whole, without having been read: what it
        should hold is known, and where it holds that already the server changes nothing."""
        manifest = children.render(
            job, kind, self.credentials.secret(job.uid) if kind == "Secret" else {}, self._defaults.findings
        )
        try:
            await self._client.create(_CHILDREN[kind].path(job.namespace), manifest)
        except AlreadyExistsError:
            if kind != "Secret":
                raise
            try:
                await self._client.replace(SECRETS.path(job.namespace, children.secret_name(job)), manifest)
            except RefusedError as error:
                raise NotRenewedError(error.code, error.reason, error.message) from None

    async def create_pod(self, job: TrainingJob, new: NewPod) -> None:
        """From the job's template."""
        await self._client.create(PODS.path(job.namespace), pods.render(job, new, self._defaults))

    async def delete_pod(self, job: TrainingJob, delete: DeletePod) -> None:
        """With the template's grace period; at once where the node is down."""
        path = PODS.path(job.namespace, delete.name)
        await self._client.delete(path, uid=delete.uid, grace=0 if delete.force else None)

    async def label_pod(self, job: TrainingJob, label: LabelPod) -> None:
        """Slot, epoch and role."""
        labels = {
            constants.LABEL_ROLE: label.role,
            constants.LABEL_SLOT: None if label.slot is None else str(label.slot),
            constants.LABEL_EPOCH: None if label.epoch is None else str(label.epoch),
        }
        patch = {"metadata": {"uid": label.uid, "labels": labels}}
        await self._client.patch(PODS.path(job.namespace, label.name), patch)

    async def post_event(self, job: TrainingJob, event: Event) -> None:
        """On the job."""
        await self._events.post(job, event)

    async def delete_job(self, job: TrainingJob) -> None:
        """Its children follow by their owner references."""
        await self._client.delete(TRAINING_JOBS.path(job.namespace, job.name), uid=job.uid)
