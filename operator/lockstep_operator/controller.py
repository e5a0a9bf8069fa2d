"""One job's loop: observe, plan, write the status, act. Everything it knows for certain is in the API objects and the
agents; what it keeps in memory only saves requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, get_args

from lockstep_api.messages import Membership
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_operator.backends.base import Backend
from lockstep_operator.errors import (
    AlreadyExistsError,
    ApiError,
    ConflictError,
    NotFoundError,
    NotRenewedError,
    RefusedError,
    TakenError,
    UnavailableError,
)
from lockstep_operator.links import Links
from lockstep_operator.plan.actions import ChildKind, Event, NewPod, Plan
from lockstep_operator.plan.observed import Observed, Refusal
from lockstep_operator.plan.plan import plan
from lockstep_operator.plan.status import patience

log = logging.getLogger(__name__)

RESYNC_SECONDS = 15.0
"""Plan at least so often: what was missed is found."""
DEBOUNCE_SECONDS = 0.02
"""Changes come in bursts; one plan serves them all."""
FORGET_CREATION_SECONDS = 30.0
"""A pod that was created and is not seen for so long is believed gone."""
REFUSAL_SECONDS = (5.0, 300.0)
"""First and longest pause after the API server refused a pod; doubled each time."""
UNAVAILABLE_SECONDS = 10.0
"""Longest pause where it only could not create it: nobody has to change anything, and whoever waits for the pod holds
GPUs meanwhile."""
CHILDREN_SECONDS = 30.0
"""Before pods are created the job's other objects are made sure of, if that was so long ago: none starts without."""
TAKEN_PAUSE_SECONDS = 10.0
"""Before a name is tried again that something else has."""
TAKEN_SECONDS = 30.0
"""A pod that had the name of a wanted one for so long keeps it: it hangs on a dead node, or is nobody's."""
RENEWAL_PAUSE_SECONDS = 300.0
"""Before the API server is asked again to replace a certificate: there are days left."""


class Reporter(Protocol):
    """Hears of each pass, for metrics."""

    def reconciled(self, job: TrainingJob, seconds: float, error: BaseException | None) -> None:
        """One pass has ended."""
        ...


@dataclass(frozen=True, slots=True)
class _Taken:
    """A pod that is another's has the name of a wanted one."""

    ordinal: int
    incarnation: int
    since: float
    tried: float


class JobController:
    """Reconciles one job until it is stopped. ``wake`` may be called at any time, from the loop's thread."""

    def __init__(
        self,
        job: TrainingJob,
        backend: Backend,
        links: Callable[[Callable[[], None]], Links],
        *,
        pod_creations: asyncio.Semaphore,
        reporter: Reporter | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.job = job
        self._backend, self._reporter, self._clock = backend, reporter, clock
        self._wake = asyncio.Event()
        self._links = links(self.wake)
        self._pod_creations = pod_creations
        self._children: set[ChildKind] = set()
        self._made_sure = 0.0  # when all of them were asked for last
        self._foreign: dict[ChildKind, float] = {}  # another's is there under its name → when it was last tried
        self._secret_version = ""  # of the Secret as this process wrote it last
        self._secret_refused_until = 0.0
        self._created: dict[str, float] = {}  # pod name → when its creation was answered
        self._taken: dict[str, _Taken] = {}  # by pod name
        self._fenced: Membership | None = None
        self._refusal: Refusal | None = None
        self._refusals = 0
        self._unanswered: UnavailableError | None = None  # in this pass, to a pod's creation
        self._written = 0.0
        self._told: list[tuple[str, str | None, str]] = []

    def wake(self) -> None:
        """Something changed."""
        self._wake.set()

    def update(self, job: TrainingJob) -> None:
        """The job as the API has it now. An older state than our own last write is passed over."""
        if _version(job) >= _version(self.job):
            self.job = job
            self.wake()

    async def run(self) -> None:
        """Reconcile until cancelled."""
        try:
            pause = 0.0
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):  # wait_for loses a cancellation that comes with a change
                        await self._wake.wait()
                await asyncio.sleep(DEBOUNCE_SECONDS)
                self._wake.clear()
                pause = await self._pass()
        finally:
            await self._links.close()

    async def _pass(self) -> float:
        """One pass; the seconds until the next one if nothing happens."""
        started = time.perf_counter()
        error: BaseException | None = None
        self._unanswered = None
        try:
            return await self.reconcile()
        except ConflictError as failure:
            log.debug("%s: %s; planning again", self.job.name, failure)
            return 0.2
        except NotFoundError:
            log.debug("%s is gone", self.job.name)
            return RESYNC_SECONDS
        except ApiError as failure:
            error = failure
            log.warning("%s: %s", self.job.name, failure)
            return 1.0
        except Exception as failure:  # one job's trouble must not end the others'
            error = failure
            log.exception("%s: planning failed", self.job.name)
            return 5.0
        finally:
            if self._reporter:
                self._reporter.reconciled(self.job, time.perf_counter() - started, error or self._unanswered)

    async def reconcile(self) -> float:
        """Observe, plan, write the status, act; the seconds until the next pass is due."""
        now = self._clock()
        decided = plan(self.job, self._observe(now), now)
        wait = patience(self.job.status, decided.status)
        due = [RESYNC_SECONDS]
        # A clock that was set back holds nothing back.
        if wait is not None and (wait == 0 or not self._written <= now < self._written + wait):
            # The status first, with the version that was read: whoever lost a race learns of it before it acts.
            self.job = await self._backend.write_status(self.job, decided.status)
            self._written = now
            if wait == 0:
                due.append(0.0)  # decisions may call for more
        elif wait is not None:
            due.append(self._written + wait - now)
        told = [(fault.at, fault.pod, fault.cause) for fault in self.job.status.faults]
        if told != self._told:
            self._backend.learn(self.job)  # what the status says: an operator that dies here is told it again
            self._told = told
        if decided.fence:
            self._fenced = decided.fence
        self._links.follow(decided)
        await self._act(decided)
        if self._refusal and self._refusal.retry_at <= now and not decided.create:
            self._refusal, self._refusals = None, 0  # what was refused is not needed any more
            self.wake()  # the condition still tells of it
        if decided.again_at is not None:
            due.append(max(0.0, decided.again_at - self._clock()))
        return min([*due, *self._until_names_are_tried()])

    def _observe(self, now: float) -> Observed:
        pods = self._backend.pods(self.job)
        seen = {pod.name for pod in pods}
        self._created = {
            name: at for name, at in self._created.items() if name not in seen and now - at < FORGET_CREATION_SECONDS
        }
        self._taken = {name: one for name, one in self._taken.items() if now - one.tried < 2 * TAKEN_SECONDS}
        waiting = {name for name, one in self._taken.items() if 0 <= now - one.tried < TAKEN_PAUSE_SECONDS}
        return Observed(
            pods=pods,
            nodes=self._backend.nodes(),
            excluded=self._backend.excluded(),
            children=frozenset(self._children - ({"Secret"} if self._secret_is_old() else set())),
            creating=frozenset(self._created.keys() | waiting),
            taken=frozenset(
                (one.ordinal, one.incarnation) for one in self._taken.values() if one.tried - one.since >= TAKEN_SECONDS
            ),
            agents=self._links.agents(pods),
            leader=self._links.leader,
            fenced=self._fenced,
            refusal=self._refusal,
            tls=self._backend.tls,
        )

    def _secret_is_old(self) -> bool:
        if self._clock() < self._secret_refused_until:
            return False
        return self._secret_version != self._backend.credentials.version(self.job.uid)

    async def _act(self, decided: Plan) -> None:
        for event in decided.events:
            await self._backend.post_event(self.job, event)
        for kind in self._kinds(decided):
            await self._create_child(kind)
        if "ConfigMap" not in self._foreign:  # pods would start with another's
            await self._create(decided.create)
        await _all(self._backend.delete_pod(self.job, pod) for pod in decided.delete)
        await _all(self._backend.label_pod(self.job, label) for label in decided.label)
        if decided.delete_job:
            await self._backend.delete_job(self.job)

    def _kinds(self, decided: Plan) -> Iterable[ChildKind]:
        """What is to be created before pods are. What was there when it was last looked at may be gone."""
        now, kinds = self._clock(), decided.children
        if decided.create and not 0 <= now - self._made_sure < CHILDREN_SECONDS:
            kinds, self._made_sure = get_args(ChildKind), now
        paused = {kind for kind, tried in self._foreign.items() if 0 <= now - tried < TAKEN_PAUSE_SECONDS}
        if now < self._secret_refused_until:
            paused.add("Secret")
        return [kind for kind in kinds if kind not in paused]

    def _until_names_are_tried(self) -> list[float]:
        """Seconds, for each name that another's had."""
        now = self._clock()
        tried = [*self._foreign.values(), *(one.tried for one in self._taken.values())]
        return [left for at in tried if (left := at + TAKEN_PAUSE_SECONDS - now) > 0]

    async def _create_child(self, kind: ChildKind) -> None:
        version = self._backend.credentials.version(self.job.uid)  # before: the next one may begin meanwhile
        try:
            with suppress(AlreadyExistsError):
                await self._backend.create_child(self.job, kind)
        except TakenError as error:
            message = f"{error.message}; the job's own is made once it is gone"
            await self._backend.post_event(self.job, Event("Warning", "NameTaken", message))
            self._children.discard(kind)
            self._foreign[kind] = self._clock()
            return
        except NotRenewedError as error:  # the job goes on with the certificate that it has
            message = f"The Secret with the job's certificate can't be replaced: {error.message}"
            await self._backend.post_event(self.job, Event("Warning", "CertificateNotRenewed", message))
            self._children.add(kind)
            self._secret_refused_until = self._clock() + RENEWAL_PAUSE_SECONDS
            return
        self._children.add(kind)
        self._foreign.pop(kind, None)
        if kind == "Secret":
            self._secret_version = version

    async def _create(self, pods: Iterable[NewPod]) -> None:
        results = await asyncio.gather(*(self._create_pod(new) for new in pods), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        refused = [failure for failure in failures if isinstance(failure, RefusedError)]
        unanswered = [failure for failure in failures if isinstance(failure, UnavailableError)]
        if refused or unanswered:
            if not refused and len(failures) < len(results):
                self._refusals = 0  # the server works; pods that came beside a refused one are taken away again
            longest = REFUSAL_SECONDS[1] if refused else UNAVAILABLE_SECONDS
            pause = min(REFUSAL_SECONDS[0] * 2**self._refusals, longest)
            self._refusals += 1
            self._unanswered = unanswered[0] if unanswered else None
            first: ApiError = refused[0] if refused else unanswered[0]
            self._refusal = Refusal("A pod", first.code, first.message, self._clock() + pause)
            await self._backend.post_event(self.job, Event("Warning", "PodRefused", first.message))
            self.wake()
        elif results and not failures:
            self._refusal, self._refusals = None, 0
        for failure in failures:
            if not isinstance(failure, RefusedError | UnavailableError):
                raise failure

    async def _create_pod(self, new: NewPod) -> None:
        async with self._pod_creations:
            try:
                with suppress(AlreadyExistsError):
                    await self._backend.create_pod(self.job, new)
            except TakenError:
                now = self._clock()
                # A clock that was set back makes the wait begin anew, and not longer.
                since = min(self._taken[new.name].since, now) if new.name in self._taken else now
                self._taken[new.name] = _Taken(new.ordinal, new.incarnation, since, now)
                if now - since >= TAKEN_SECONDS:
                    self.wake()
                return
            self._taken.pop(new.name, None)
            self._created[new.name] = self._clock()


async def _all(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, NotFoundError):
            raise result


def _version(job: TrainingJob) -> int:
    """Resource versions of one object grow, and are documented as comparable numbers since Kubernetes 1.35; before,
    they were numbers by implementation."""
    text = str(job.metadata.get("resourceVersion", "0"))
    return int(text) if text.isdigit() else 0
