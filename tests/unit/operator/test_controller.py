"""The loop around the plan: order, races, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.controller import JobController
from lockstep_operator.errors import AlreadyExistsError, ConflictError, RefusedError
from lockstep_operator.links import Links
from lockstep_operator.plan.actions import DeletePod, Event, LabelPod, NewPod
from lockstep_operator.plan.observed import Node, Pod
from unit.operator.builders import make_job


class Recorder:
    """A backend that writes down what it is asked for, and fails where a test wants it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}

    def pods(self, job: TrainingJob) -> tuple[Pod, ...]:
        return ()

    def nodes(self) -> Mapping[str, Node]:
        return {}

    def excluded(self) -> frozenset[str]:
        return frozenset()

    def learn(self, job: TrainingJob) -> None:
        self.calls.append("learn")

    def token(self, job: TrainingJob) -> str:
        return "token"

    async def write_status(self, job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        self._do("status")
        version = int(job.metadata.get("resourceVersion", 1)) + 1
        return job.model_copy(update={"status": status, "metadata": {**job.metadata, "resourceVersion": str(version)}})

    async def create_child(self, job: TrainingJob, kind: Any) -> None:
        self._do(kind)

    async def create_pod(self, job: TrainingJob, new: NewPod) -> None:
        self._do(new.name)

    async def delete_pod(self, job: TrainingJob, delete: DeletePod) -> None:
        self._do(f"delete {delete.name}")

    async def label_pod(self, job: TrainingJob, label: LabelPod) -> None:
        self._do(f"label {label.name}")

    async def post_event(self, job: TrainingJob, event: Event) -> None:
        self._do(f"event {event.reason}")

    async def delete_job(self, job: TrainingJob) -> None:
        self._do("delete job")

    def _do(self, call: str) -> None:
        self.calls.append(call)
        if failure := self.fails.pop(call, None):
            raise failure


def passes(backend: Recorder, count: int, job: TrainingJob | None = None) -> list[float | str]:
    """What so many passes returned: seconds to wait, or the name of the error."""

    async def main() -> list[float | str]:
        results: list[float | str] = []
        async with aiohttp.ClientSession() as session:
            controller = JobController(
                job or make_job(nodes=2),
                backend,
                lambda changed: Links(session, "token", changed, asyncio.Semaphore()),
                pod_creations=asyncio.Semaphore(8),
            )
            for _ in range(count):
                try:
                    results.append(await controller.reconcile())
                except Exception as error:
                    results.append(type(error).__name__)
        return results

    return asyncio.run(main())


def test_the_status_is_written_before_anything_is_done() -> None:
    backend = Recorder()
    passes(backend, 1)
    assert backend.calls == ["status", "Service", "Secret", "ConfigMap", "run-0-0", "run-1-0"]


def test_who_lost_a_race_does_nothing() -> None:
    backend = Recorder()
    backend.fails["status"] = ConflictError(409, "Conflict", "the object has been modified")
    assert passes(backend, 1) == ["ConflictError"]
    assert backend.calls == ["status"]


def test_what_exists_already_is_done() -> None:
    """A predecessor may have created half of it."""
    backend = Recorder()
    for name in ("Secret", "run-0-0"):
        backend.fails[name] = AlreadyExistsError(409, "AlreadyExists", f"{name} already exists")
    first, _ = passes(backend, 2)
    assert not isinstance(first, str)
    assert backend.calls.count("Secret") == backend.calls.count("run-0-0") == 1


def test_a_pod_that_the_cache_has_not_shown_yet_is_not_created_again() -> None:
    backend = Recorder()
    passes(backend, 4)
    assert [call for call in backend.calls if call.startswith("run-")] == ["run-0-0", "run-1-0"]


def test_a_refusal_is_told_once_and_tried_again_later() -> None:
    backend = Recorder()
    backend.fails["run-1-0"] = RefusedError(403, "Forbidden", "exceeded quota: small")
    passes(backend, 3)
    assert backend.calls.count("event PodRefused") == 1
    assert backend.calls.count("run-1-0") == 1


def test_another_controllers_job_is_not_touched() -> None:
    backend = Recorder()
    passes(backend, 2, make_job(managedBy="example.com/other"))
    assert backend.calls == []
