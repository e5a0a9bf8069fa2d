"""What the controller needs of a place where pods run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.credentials import Credentials
from lockstep_operator.plan.actions import ChildKind, DeletePod, Event, LabelPod, NewPod
from lockstep_operator.plan.observed import Node, Pod


class Backend(Protocol):
    """Methods raise ``errors.ApiError``; that an object is there (or gone) already counts as done. Reading is from
    memory and cheap; the backend wakes the job's controller when something changes."""

    def pods(self, job: TrainingJob) -> tuple[Pod, ...]:
        """All pods of the job."""
        ...

    def nodes(self) -> Mapping[str, Node]:
        """Nodes by name; empty where nothing is known of them."""
        ...

    def excluded(self) -> frozenset[str]:
        """Nodes that new pods of all jobs stay away from."""
        ...

    def learn(self, job: TrainingJob) -> None:
        """Hear of the faults in the job's status, for the memory of nodes. Telling the same again changes nothing."""
        ...

    @property
    def credentials(self) -> Credentials:
        """What jobs and operator prove with who they are."""
        ...

    @property
    def tls(self) -> bool:
        """Whether the agents of a job that starts speak TLS."""
        ...

    async def write_status(self, job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        """Replace the status if the job is still as it was read; the job as it is then. Raises errors.ConflictError,
        errors.NotFoundError."""
        ...

    async def create_child(self, job: TrainingJob, kind: ChildKind) -> None:
        """Create the Service, Secret or ConfigMap; replace the Secret where it is there. Raises
        errors.NotRenewedError, and errors.TakenError where another's is there under its name."""
        ...

    async def create_pod(self, job: TrainingJob, new: NewPod) -> None:
        """Create a pod. Raises errors.RefusedError, errors.UnavailableError, and errors.TakenError where another's pod
        has its name."""
        ...

    async def delete_pod(self, job: TrainingJob, delete: DeletePod) -> None:
        """Delete a pod if it still has that uid."""
        ...

    async def label_pod(self, job: TrainingJob, label: LabelPod) -> None:
        """Change a pod's labels."""
        ...

    async def post_event(self, job: TrainingJob, event: Event) -> None:
        """Tell people."""
        ...

    async def delete_job(self, job: TrainingJob) -> None:
        """Delete the job itself."""
        ...
