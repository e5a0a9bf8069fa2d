"""Names that something else has: objects of a deleted job of the same name, a pod on a dead node, a user's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import aiohttp
import pytest

from lockstep_api.v1alpha1 import TrainingJob
from lockstep_operator.backends.kubernetes import KubernetesBackend
from lockstep_operator.cache import ClusterCache, job_pod
from lockstep_operator.controller import CHILDREN_SECONDS, TAKEN_PAUSE_SECONDS, TAKEN_SECONDS, JobController
from lockstep_operator.errors import AlreadyExistsError, ConflictError, NotFoundError, RefusedError
from lockstep_operator.events import EventPoster
from lockstep_operator.kube import KubeClient, Manifest, Page
from lockstep_operator.links import Links
from lockstep_operator.nodememory import NodeMemory
from lockstep_operator.plan.observed import Node, Pod
from lockstep_operator.plan.pods import PodDefaults
from unit.operator.builders import CREDENTIALS, START, UID, make_job

CONFIG_MAP = "api/v1/namespaces/team/configmaps/run-lockstep-config"
SECRET = "api/v1/namespaces/team/secrets/run-lockstep-token"
SERVICE = "api/v1/namespaces/team/services/run"
PODS = "api/v1/namespaces/team/pods"
EVENTS = "api/v1/namespaces/team/events"


def other(name: str) -> Manifest:
    """An object that the job of the same name before this one has left."""
    return {"metadata": {"name": name, "ownerReferences": [{"uid": "of before", "controller": True}]}}


class Api:
    """Objects by path, in place of an API server and the client that asks it."""

    def __init__(self) -> None:
        self.objects: dict[str, Manifest] = {}
        self.requests: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.now = START

    async def create(self, path: str, body: Manifest, *, strict: bool = False) -> Manifest:
        at = self._asked("POST", f"{path}/{body['metadata']['name']}")
        if at in self.objects:
            raise AlreadyExistsError(409, "AlreadyExists", f"{at} already exists")
        body["metadata"] |= {"uid": f"uid-{at}", "creationTimestamp": "2026-01-02T03:04:05Z"}
        self.objects[at] = body
        return body

    async def get(self, path: str) -> Manifest:
        return self._there(self._asked("GET", path))

    async def list(self, path: str, *, fields: str) -> Page:
        at = self._asked("LIST", f"{path}/{fields.removeprefix('metadata.name=')}")
        return Page([self.objects[at]] if at in self.objects else [], "1")

    async def replace(self, path: str, body: Manifest) -> Manifest:
        self._there(self._asked("PUT", path))
        self.objects[path] = body
        return body

    async def patch(self, path: str, body: Any, kind: str = "") -> Manifest:
        job = make_job(nodes=2).to_wire()
        return {**job, "metadata": {**job["metadata"], "resourceVersion": "2"}, "status": body[1]["value"]}

    def owner(self, path: str) -> str:
        return str(self.objects[path]["metadata"]["ownerReferences"][0]["uid"])

    def pods(self) -> list[str]:
        """Names of this job's."""
        return [path.rpartition("/")[2] for path in self.objects if path.startswith(PODS) and self.owner(path) == UID]

    def lose(self, owner: str) -> None:
        """The garbage collector comes for what that one has left."""
        owned = [path for path, one in self.objects.items() if "ownerReferences" in one["metadata"]]
        for path in owned:
            if self.owner(path) == owner:
                del self.objects[path]

    def said(self) -> list[str]:
        """What the events tell."""
        return [one["message"] for path, one in self.objects.items() if path.startswith(EVENTS)]

    def _asked(self, verb: str, path: str) -> str:
        self.requests.append(f"{verb} {path}")
        if failure := self.fails.pop(self.requests[-1], None):
            raise failure
        return path

    def _there(self, path: str) -> Manifest:
        if path not in self.objects:
            raise NotFoundError(404, "NotFound", f"{path} not found")
        return self.objects[path]


class Cache:
    """Sees everything at once."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def pods(self, namespace: str, job_uid: str) -> tuple[Pod, ...]:
        found = [job_pod(one) for path, one in self._api.objects.items() if path.startswith(PODS) and "spec" in one]
        return tuple(one[1] for one in found if one and one[0] == (namespace, job_uid))

    def nodes(self) -> dict[str, Node]:
        return {}


class Memory:
    """Of no node."""

    def excluded(self) -> frozenset[str]:
        return frozenset()

    def learn(self, job: TrainingJob) -> None:
        pass


def passes(api: Api, *pauses: float, between: Callable[[], None] = lambda: None) -> list[str]:
    """The errors of so many passes of one controller, each followed by a pause."""

    async def main() -> list[str]:
        client = cast(KubeClient, api)
        backend = KubernetesBackend(
            client,
            cast(ClusterCache, Cache(api)),
            memory=cast(NodeMemory, Memory()),
            events=EventPoster(client),
            defaults=PodDefaults(),
            credentials=CREDENTIALS,
        )
        errors = []
        job = make_job(nodes=2)
        job = job.model_copy(update={"metadata": {**job.metadata, "resourceVersion": "1"}})
        async with aiohttp.ClientSession() as session:
            controller = JobController(
                job,
                backend,
                lambda changed: Links(session, "token", changed, asyncio.Semaphore(), tls=CREDENTIALS.context(UID)),
                pod_creations=asyncio.Semaphore(8),
                clock=lambda: api.now,
            )
            for pause in pauses:
                try:
                    await controller.reconcile()
                except Exception as error:
                    errors.append(type(error).__name__)
                api.now += pause
                between()
        return errors

    return asyncio.run(main())


@pytest.fixture
def api() -> Api:
    return Api()


def test_what_a_deleted_job_has_left_is_never_taken_for_this_ones(api: Api) -> None:
    """As with `kubectl replace --force`: the garbage collector comes in a moment."""
    api.objects = {CONFIG_MAP: other("run-lockstep-config"), SERVICE: other("run"), SECRET: other("run-lockstep-token")}
    assert passes(api, 0, 0, 0) == []
    assert api.requests.count(f"POST {CONFIG_MAP}") == 1  # not at each pass
    assert api.owner(SECRET) == UID  # it was replaced
    assert api.pods() == []
    assert any("ConfigMap run-lockstep-config is there and was not made for this job" in one for one in api.said())

    api.lose("of before")
    api.now += TAKEN_PAUSE_SECONDS
    assert passes(api, 0) == []
    assert api.owner(CONFIG_MAP) == api.owner(SERVICE) == UID
    assert api.pods() == ["run-0-0", "run-1-0"]


def test_a_name_is_tried_again_by_the_operator_that_found_it_taken(api: Api) -> None:
    api.objects = {CONFIG_MAP: other("run-lockstep-config")}
    passes(api, TAKEN_PAUSE_SECONDS, 0, between=lambda: api.lose("of before"))
    assert api.owner(CONFIG_MAP) == UID
    assert api.pods() == ["run-0-0", "run-1-0"]


def test_a_service_of_the_users_own_keeps_no_pod_from_its_place(api: Api) -> None:
    api.objects = {SERVICE: {"metadata": {"name": "run"}}}
    passes(api, 0)
    assert api.pods() == ["run-0-0", "run-1-0"]
    assert any("Service run is there" in one for one in api.said())


def test_an_operator_that_may_not_look_believes_what_is_there(api: Api) -> None:
    """With a role of before, a job that runs goes on."""
    api.objects = {CONFIG_MAP: other("run-lockstep-config")}
    api.fails[f"GET {CONFIG_MAP}"] = RefusedError(403, "Forbidden", "cannot get configmaps")
    passes(api, 0)
    assert api.pods() == ["run-0-0", "run-1-0"]


def test_what_went_while_it_was_looked_at_is_created_again(api: Api) -> None:
    api.fails[f"POST {CONFIG_MAP}"] = AlreadyExistsError(409, "AlreadyExists", "it is there")
    api.fails[f"POST {PODS}/run-1-0"] = AlreadyExistsError(409, "AlreadyExists", "it is there")
    assert passes(api, 0, 0, 0) == ["ConflictError", "ConflictError"]
    assert CONFIG_MAP in api.objects
    assert api.pods() == ["run-0-0", "run-1-0"]


def test_two_creations_at_one_quota_are_no_reason_to_believe_anything(api: Api) -> None:
    conflict = 'Operation cannot be fulfilled on resourcequotas "small": the object has been modified'
    api.fails[f"POST {PODS}/run-1-0"] = ConflictError(409, "Conflict", conflict)
    assert passes(api, 0, 0) == ["ConflictError"]
    assert api.pods() == ["run-0-0", "run-1-0"]


def test_before_pods_are_created_what_they_need_is_made_sure_of(api: Api) -> None:
    def lose() -> None:
        api.objects.pop(f"{PODS}/run-1-0", None)
        api.objects.pop(CONFIG_MAP, None)
        lost.append(len(api.requests))

    lost: list[int] = []
    passes(api, CHILDREN_SECONDS, 0, between=lose)
    assert CONFIG_MAP not in api.objects
    assert f"POST {CONFIG_MAP}" in api.requests[lost[0] : lost[1]]

    before = len(api.requests)
    passes(api, *[1] * 60, between=lambda: None)
    written = [one for one in api.requests[before:] if one.startswith("POST") and "/events/" not in one]
    assert len(written) <= 5  # its start: three objects and at most two pods; then nothing more


def test_a_pod_that_hangs_under_a_wanted_name_is_passed_over(api: Api) -> None:
    """The old job's, in Terminating on a dead node: it is not there for this operator to delete."""
    api.objects[f"{PODS}/run-1-0"] = other("run-1-0")
    passes(api, *[1] * int(TAKEN_SECONDS - 1))
    assert api.pods() == ["run-0-0"]  # most such pods go by themselves
    assert len([one for one in api.requests if one == f"POST {PODS}/run-1-0"]) == TAKEN_SECONDS / TAKEN_PAUSE_SECONDS

    api.requests.clear()
    passes(api, *[1] * int(TAKEN_SECONDS + 3))
    assert api.pods() == ["run-0-0", "run-1-1"]
    assert [one for one in api.said() if "run-1-1 takes its place" in one]


def test_a_wanted_name_that_becomes_free_is_used(api: Api) -> None:
    api.objects[f"{PODS}/run-1-0"] = other("run-1-0")
    passes(api, TAKEN_PAUSE_SECONDS, 0, between=lambda: api.lose("of before"))
    assert api.pods() == ["run-0-0", "run-1-0"]
    assert not [one for one in api.said() if "takes its place" in one]


def test_a_clock_that_was_set_back_does_not_make_the_wait_longer(api: Api) -> None:
    def set_back() -> None:
        passed.append(api.now)
        if len(passed) == 15:
            api.now -= 3600

    passed: list[float] = []
    api.objects[f"{PODS}/run-1-0"] = other("run-1-0")
    passes(api, *[1] * int(15 + TAKEN_SECONDS + 3), between=set_back)
    assert api.pods() == ["run-0-0", "run-1-1"]


# ------------------------------------------------------------------------------------------------ a quota that is full

FULL = "is forbidden: exceeded quota: small, requested: services=1, used: services=1, limited: services=1"


def fill(api: Api) -> None:
    """Of everything but pods no more may be made, whether it is there or not: a server looks at the quota first."""
    for path in (SERVICE, SECRET, CONFIG_MAP):
        api.fails[f"POST {path}"] = RefusedError(403, "Forbidden", f"{path} {FULL}")


def test_a_quota_that_the_jobs_own_objects_fill_keeps_no_pod_from_its_place(api: Api) -> None:
    """A pod is lost, and another operator makes the next one."""
    assert passes(api, 0) == []
    secret = api.objects[SECRET]
    del api.objects[f"{PODS}/run-1-0"]
    fill(api)
    assert passes(api, 0) == []
    assert api.pods() == ["run-0-0", "run-1-0"]
    assert api.objects[SECRET] is not secret, "it was replaced, and so it is the one that this operator knows"


def test_a_quota_that_others_fill_is_told_of(api: Api) -> None:
    fill(api)
    api.objects = {SERVICE: {"metadata": {"name": "run"}}}
    assert passes(api, 0) == ["RefusedError"]
    assert api.pods() == []
    assert any("Service run is there and was not made for this job" in one for one in api.said())


def test_who_is_refused_and_may_not_look_believes_nothing(api: Api) -> None:
    passes(api, 0)
    del api.objects[f"{PODS}/run-1-0"]
    fill(api)
    api.fails[f"GET {CONFIG_MAP}"] = RefusedError(403, "Forbidden", "cannot get configmaps")
    assert passes(api, 0) == ["RefusedError"]
    assert api.pods() == ["run-0-0"]
