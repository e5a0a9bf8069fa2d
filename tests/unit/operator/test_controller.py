"""The loop around the plan: order, races, refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import aiohttp

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_operator.controller import RENEWAL_PAUSE_SECONDS, RESYNC_SECONDS, JobController
from lockstep_operator.credentials import Credentials, MasterKeys
from lockstep_operator.errors import AlreadyExistsError, ConflictError, NotRenewedError, RefusedError, UnavailableError
from lockstep_operator.links import Links
from lockstep_operator.plan.actions import DeletePod, Event, LabelPod, NewPod
from lockstep_operator.plan.observed import Node, Pod
from lockstep_operator.plan.renewal import Validity
from lockstep_operator.plan.status import find_condition
from unit.operator.builders import CREDENTIALS, START, UID, make_job


class Recorder:
    """A backend that writes down what it is asked for, and fails where a test wants it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.credentials, self.tls = CREDENTIALS, True

    def pods(self, job: TrainingJob) -> tuple[Pod, ...]:
        return ()

    def nodes(self) -> Mapping[str, Node]:
        return {}

    def excluded(self) -> frozenset[str]:
        return frozenset()

    def learn(self, job: TrainingJob) -> None:
        self.calls.append("learn")

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


def passes(
    backend: Recorder,
    count: int,
    job: TrainingJob | None = None,
    *,
    clock: Callable[[], float] = time.time,
    after: Callable[[], None] = lambda: None,
) -> list[float | str]:
    """What so many passes returned: seconds to wait, or the name of the error."""

    async def main() -> list[float | str]:
        results: list[float | str] = []
        async with aiohttp.ClientSession() as session:
            controller = JobController(
                job or make_job(nodes=2),
                backend,
                lambda changed: Links(session, "token", changed, asyncio.Semaphore(), tls=CREDENTIALS.context(UID)),
                pod_creations=asyncio.Semaphore(8),
                clock=clock,
            )
            for _ in range(count):
                try:
                    results.append(await controller.reconcile())
                except Exception as error:
                    results.append(type(error).__name__)
                after()
        return results

    return asyncio.run(main())


def test_a_controller_ends_although_something_has_changed_at_that_instant() -> None:
    """A cancellation that is lost would leave a job led by nobody's order, and Ctrl-C without an effect."""

    async def main() -> bool:
        async with aiohttp.ClientSession() as session:
            controller = JobController(
                make_job(nodes=2),
                Recorder(),
                lambda changed: Links(session, "token", changed, asyncio.Semaphore(), tls=CREDENTIALS.context(UID)),
                pod_creations=asyncio.Semaphore(8),
            )
            running = asyncio.create_task(controller.run())
            await asyncio.sleep(1.0)  # it waits for a change now
            controller.wake()
            running.cancel()
            await asyncio.wait({running}, timeout=2.0)
            ended = running.done()
            running.cancel()
            return ended

    assert asyncio.run(main())


def test_the_status_is_written_before_anything_is_done() -> None:
    backend = Recorder()
    passes(backend, 1)
    assert backend.calls == ["status", "Service", "Secret", "ConfigMap", "run-0-0", "run-1-0"]


def test_a_clock_that_was_set_back_holds_no_decision_back() -> None:
    class Failing(Recorder):
        def pods(self, job: TrainingJob) -> tuple[Pod, ...]:
            return (Pod("run-0-0", "uid-0", 0, 0, "Failed", START),) if now < START else ()

    def set_back() -> None:
        nonlocal now
        now = START - 600

    now, backend = START, Failing()
    passes(backend, 2, clock=lambda: now, after=set_back)
    second = backend.calls[backend.calls.index("run-1-0") + 1 :]
    assert second[0] == "status"
    assert second[-2:] == ["run-0-1", "delete run-0-0"]


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


def test_a_server_that_can_not_create_pods_is_told_and_asked_again_later() -> None:
    """As where a webhook is down: asking each second, for each pod, would not bring it up."""
    backend = Recorder()
    backend.fails["run-1-0"] = UnavailableError(500, "InternalError", "failed calling webhook")
    pauses = passes(backend, 3)
    assert "UnavailableError" not in pauses
    assert backend.calls.count("event PodRefused") == 1
    assert backend.calls.count("run-1-0") == 1


class Away(Recorder):
    """One whose server can't create a job's first pods for a time, beginning with the first of them."""

    def __init__(self, *failures: int) -> None:
        super().__init__()
        self.now = START
        self.there: list[Pod] = []
        self.tried: list[float] = []
        self._failures, self._failing = list(failures), 0  # how many creations fail, in each pass that tries some

    def pods(self, job: TrainingJob) -> tuple[Pod, ...]:
        return tuple(self.there)

    async def create_pod(self, job: TrainingJob, new: NewPod) -> None:
        if self.now not in self.tried:
            self.tried.append(self.now)
            self._failing = self._failures.pop(0) if self._failures else 0
        if self._failing:
            self._failing -= 1
            raise UnavailableError(500, "InternalError", "failed calling webhook")
        self.there.append(Pod(new.name, f"uid-{new.name}", new.ordinal, new.incarnation, "Pending", START))

    def pauses(self, nodes: int) -> list[float]:
        """Seconds between the passes that tried, until a minute has passed."""

        def later() -> None:
            self.now += 1

        passes(self, 60, make_job(nodes=nodes), clock=lambda: self.now, after=later)
        return [after - before for before, after in pairwise(self.tried)]


def test_a_server_that_answers_some_requests_is_asked_for_the_other_pods_soon() -> None:
    """As where a webhook times out now and then: a job of many pods would take ten minutes to come up."""
    backend = Away(5, 4, 3, 2, 1)
    assert backend.pauses(nodes=6) == [5, 5, 5, 5, 5]
    assert len(backend.there) == 6


def test_a_server_that_was_away_for_long_is_found_back_soon() -> None:
    """A job that waits for one pod holds the GPUs of all others."""
    assert Away(2, 2, 2, 2).pauses(nodes=2) == [5, 10, 10, 10]


def test_what_is_refused_beside_pods_that_are_created_is_tried_ever_less() -> None:
    """Under a quota they would come and go without end."""
    backend, times = Recorder(), [START]
    create = backend.create_pod

    async def full(job: TrainingJob, new: NewPod) -> None:
        if new.ordinal == 1:
            tried.append(times[-1])
            raise RefusedError(403, "Forbidden", "exceeded quota: small")
        await create(job, new)

    tried: list[float] = []
    backend.create_pod = full  # type: ignore[method-assign]
    passes(backend, 60, clock=lambda: times[-1], after=lambda: times.append(times[-1] + 1))
    assert [after - before for before, after in pairwise(tried)] == [5, 10, 20]


def test_a_pass_in_which_the_server_could_not_create_pods_counts_as_an_error() -> None:
    class Metrics:
        def reconciled(self, job: TrainingJob, seconds: float, error: BaseException | None) -> None:
            told.append(type(error).__name__ if error else "")
            if len(told) == 2:
                done.set()

    async def main() -> None:
        backend = Recorder()
        backend.fails["run-1-0"] = UnavailableError(500, "InternalError", "failed calling webhook")
        async with aiohttp.ClientSession() as session:
            controller = JobController(
                make_job(nodes=2),
                backend,
                lambda changed: Links(session, "token", changed, asyncio.Semaphore(), tls=CREDENTIALS.context(UID)),
                pod_creations=asyncio.Semaphore(8),
                reporter=Metrics(),
            )
            running = asyncio.create_task(controller.run())
            await done.wait()
            running.cancel()
            await asyncio.wait({running})

    told: list[str] = []
    done = asyncio.Event()
    asyncio.run(main())
    assert told == ["UnavailableError", ""]


class Meanwhile(Recorder):
    """One in which the pods are there after all, and which keeps the status."""

    there: tuple[Pod, ...] = ()
    status = TrainingJobStatus()

    def pods(self, job: TrainingJob) -> tuple[Pod, ...]:
        return self.there

    async def write_status(self, job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        self.status = status
        return await super().write_status(job, status)


def test_a_refusal_of_what_is_not_needed_any_more_is_forgotten() -> None:
    """Else the controller would plan without pause, and the job tell of it for ever."""
    backend, times = Meanwhile(), [START]
    backend.fails["run-1-0"] = RefusedError(403, "Forbidden", "exceeded quota: small")
    told = []

    def after() -> None:
        ready = find_condition(backend.status, "Ready")
        told.append(ready and ready.reason)
        backend.there = tuple(Pod(f"run-{n}-0", f"u{n}", n, 0, "Pending", START) for n in range(2))
        times.append(times[-1] + 2)

    pauses = passes(backend, 8, clock=lambda: times[-1], after=after)
    assert told[1] == "CreationRefused"
    assert told[-1] == "PodsPending"
    assert 0.0 not in pauses[-3:]


def test_where_nothing_is_due_the_next_pass_comes_by_itself() -> None:
    pauses = passes(Recorder(), 2, make_job(managedBy="example.com/other"))
    assert pauses == [RESYNC_SECONDS, RESYNC_SECONDS]


def test_another_controllers_job_is_not_touched() -> None:
    backend = Recorder()
    passes(backend, 2, make_job(managedBy="example.com/other"))
    assert backend.calls == []


# ---------------------------------------------------------------------------------------------- certificates


class Moving:
    """A clock that tests move, and certificates that live by it."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.backend = Recorder()
        self.backend.credentials = Credentials(MasterKeys(b"a master key for tests"), Validity(1000, 500), self)

    def __call__(self) -> float:
        return self.now

    def writes(self, *pauses: float) -> list[int]:
        """How often the Secret was written in all, after each pass; the next pass comes after a pause."""
        written = []

        def after() -> None:
            written.append(self.backend.calls.count("Secret"))
            self.now += pauses[len(written) - 1]

        passes(self.backend, len(pauses), clock=self, after=after)
        return written


def test_the_secret_is_written_once_in_each_window() -> None:
    assert Moving().writes(0, 500, 0, 500, 0) == [1, 1, 2, 2, 3]


def test_a_secret_that_can_not_be_replaced_is_told_and_stops_nothing() -> None:
    """As with a role of before certificates: what is there still works, and is tried again, now and then."""
    moving = Moving()
    moving.backend.fails["Secret"] = NotRenewedError(403, "Forbidden", "cannot update secrets")
    assert moving.writes(0, RENEWAL_PAUSE_SECONDS, 0) == [1, 1, 2]
    assert moving.backend.calls.count("event CertificateNotRenewed") == 1
    assert {"run-0-0", "run-1-0"} <= set(moving.backend.calls)
