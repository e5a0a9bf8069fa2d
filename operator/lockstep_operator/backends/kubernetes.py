"""Pods in a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Mapping

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.cache import ClusterCache
from lockstep_operator.credentials import Credentials
from lockstep_operator.errors import (
    AlreadyExistsError,
    ConflictError,
    NotFoundError,
    NotRenewedError,
    RefusedError,
    TakenError,
)
from lockstep_operator.events import EventPoster
from lockstep_operator.kube import (
    CONFIG_MAPS,
    JSON_PATCH,
    PODS,
    SECRETS,
    SERVICES,
    TRAINING_JOBS,
    KubeClient,
    Manifest,
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
        should hold is known, and where it holds that already the server changes nothing. The others stay as they were
        made, if it was for this job."""
        manifest = children.render(
            job, kind, self.credentials.secret(job.uid) if kind == "Secret" else {}, self._defaults.findings
        )
        try:
            await self._client.create(_CHILDREN[kind].path(job.namespace), manifest)
        except AlreadyExistsError:
            if kind == "Secret":
                await self._replace_secret(job, manifest)
            else:
                await self._look_at(job, kind)
                raise
        except RefusedError as refusal:
            if refusal.code != 403:
                raise
            await self._find(job, kind, manifest, refusal)

    async def _find(self, job: TrainingJob, kind: ChildKind, manifest: Manifest, refusal: RefusedError) -> None:
        """A quota that is full refuses an object before it is seen that it is there, and counts in the quota. Raises
        ``refusal`` where it is not, or nobody may look."""
        path = _CHILDREN[kind].path(job.namespace, children.name_of(job, kind))
        try:
            if kind == "Secret":
                await self._client.replace(path, manifest)
            else:
                _must_own(job, kind, await self._client.get(path))
        except (NotFoundError, RefusedError):
            raise refusal from None

    async def _replace_secret(self, job: TrainingJob, manifest: Manifest) -> None:
        try:
            await self._client.replace(SECRETS.path(job.namespace, children.secret_name(job)), manifest)
        except RefusedError as error:
            raise NotRenewedError(error.code, error.reason, error.message) from None
        except NotFoundError as error:  # it went in between
            raise ConflictError(error.code, error.reason, error.message) from None

    async def _look_at(self, job: TrainingJob, kind: ChildKind) -> None:
        """Whose it is. Where a role of before does not allow to look, what is there is believed, as it was then."""
        try:
            manifest = await self._client.get(_CHILDREN[kind].path(job.namespace, children.name_of(job, kind)))
        except RefusedError:
            return
        except NotFoundError as error:  # it went in between
            raise ConflictError(error.code, error.reason, error.message) from None
        _must_own(job, kind, manifest)

    async def create_pod(self, job: TrainingJob, new: NewPod) -> None:
        """From the job's template, of which the API server refuses unknown fields. A job that has trained goes on with
        those that an earlier release of the operator let pass."""
        path = PODS.path(job.namespace)
        try:
            manifest = pods.render(job, new, self._defaults)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"an entry lacks the field {error}" if isinstance(error, KeyError) else str(error)
            raise RefusedError(422, "Invalid", f"no pod can be made from spec.template: {what}") from None
        try:
            await self._client.create(path, manifest, strict=job.status.epoch == 0)
        except AlreadyExistsError:
            there = (await self._client.list(path, fields=f"metadata.name={new.name}")).items
            if not there:
                raise ConflictError(409, "Conflict", f"pod {new.name} went while it was looked at") from None
            _must_own(job, "pod", there[0])
            raise

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


def _must_own(job: TrainingJob, kind: str, manifest: Manifest) -> None:
    if not children.controlled_by(manifest, job.uid):
        name = manifest["metadata"]["name"]
        raise TakenError(409, "AlreadyExists", f"{kind} {name} is there and was not made for this job")
