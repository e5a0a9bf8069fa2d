"""The client and the cache, against a small API server stand-in that fails as real ones do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import kopf
import pytest
from aiohttp import web

from lockstep_api import constants
from lockstep_operator.cache import ClusterCache, trim_node, trim_pod
from lockstep_operator.errors import (
    AlreadyExistsError,
    ApiError,
    ConflictError,
    ExpiredError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from lockstep_operator.kube import PODS, KubeClient


def pod(name: str, uid: str, version: int = 1, **status: Any) -> dict[str, Any]:
    """A pod of job ``j``."""
    return {
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": uid,
            "resourceVersion": str(version),
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "labels": {constants.LABEL_JOB_UID: "j", constants.LABEL_ORDINAL: "4", constants.LABEL_INCARNATION: "2"},
            "ownerReferences": [{"kind": constants.KIND, "name": "run", "uid": "j", "controller": True}],
        },
        "spec": {"nodeName": "node-a"},
        "status": status,
    }


class Server:
    """Answers from a list that the test fills: (status, body) per request, the last one for ever."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.answers: list[tuple[int, Any]] = []
        self.watches: list[list[dict[str, Any]]] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if request.query.get("watch"):
            return await self._watch(request)
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        if not self.watches:
            await asyncio.sleep(3600)
        for event in self.watches.pop(0):
            await response.write(json.dumps(event).encode() + b"\n")
        return response


def run(server: Server, test: Callable[[KubeClient], Awaitable[None]]) -> None:
    async def main() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with asyncio.timeout(20), KubeClient(kopf.ConnectionInfo(server=address)) as client:
            await test(client)
        await runner.cleanup()

    asyncio.run(main())


def failure(code: int, message: str = "no") -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "code": code, "reason": "R", "message": message}


@pytest.mark.parametrize(
    ("code", "error"),
    [(404, NotFoundError), (409, ConflictError), (400, RefusedError), (403, RefusedError), (422, RefusedError)],
)
def test_errors_have_types_and_the_servers_words(code: int, error: type[Exception]) -> None:
    server = Server()
    server.answers = [failure(code, "exceeded quota")]

    async def test(client: KubeClient) -> None:
        with pytest.raises(error, match="exceeded quota"):
            await client.get("api/v1/pods")
        assert len(server.requests) == 1  # the same question would get the same answer

    run(server, test)


@pytest.mark.parametrize(
    "answer",
    [
        "Client sent an HTTP request to an HTTPS server.",
        '{"type": "error", "message": "bad request"}',
        '["bad request"]',
    ],
)
def test_what_a_proxy_does_not_understand_is_no_word_of_the_servers(answer: str) -> None:
    """A template that is refused with 400 ends its job for good."""
    server = Server()
    server.answers = [(400, answer)]

    async def test(client: KubeClient) -> None:
        with pytest.raises(ApiError) as caught:
            await client.create("api/v1/namespaces/team/pods", {})
        assert not isinstance(caught.value, RefusedError)

    run(server, test)


@pytest.mark.parametrize(("reason", "error"), [("AlreadyExists", AlreadyExistsError), ("Conflict", ConflictError)])
def test_only_what_is_there_already_is_there(reason: str, error: type[Exception]) -> None:
    """A quota that two creations met at answers 409 as well, and nothing was created."""
    server = Server()
    server.answers = [(409, {"kind": "Status", "code": 409, "reason": reason, "message": "no"})]

    async def test(client: KubeClient) -> None:
        with pytest.raises(error):
            await client.create("api/v1/pods", {})

    run(server, test)


@pytest.mark.parametrize("code", [429, 500, 503])
def test_what_may_pass_is_tried_again(code: int) -> None:
    server = Server()
    server.answers = [failure(code), failure(code), (200, {"kind": "Pod"})]

    async def test(client: KubeClient) -> None:
        assert await client.get("api/v1/pods/a") == {"kind": "Pod"}

    run(server, test)


def test_a_server_that_stays_away_is_an_error_with_its_address() -> None:
    async def main() -> None:
        async with KubeClient(kopf.ConnectionInfo(server="http://127.0.0.1:9")) as client:
            with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9 does not answer"):
                await client.get("api/v1/pods")

    asyncio.run(main())


def test_lists_come_in_pages() -> None:
    server = Server()
    server.answers = [
        (200, {"metadata": {"resourceVersion": "5", "continue": "next"}, "items": [{"a": 1}]}),
        (200, {"metadata": {"resourceVersion": "5"}, "items": [{"b": 2}]}),
    ]

    async def test(client: KubeClient) -> None:
        page = await client.list(PODS.path("team"), labels="x")
        assert (page.items, page.resource_version) == ([{"a": 1}, {"b": 2}], "5")
        assert [request.query.get("continue") for request in server.requests] == [None, "next"]
        assert server.requests[0].path == "/api/v1/namespaces/team/pods"

    run(server, test)


def test_a_watch_takes_lines_of_any_length_and_tells_when_it_is_too_old() -> None:
    server = Server()
    long = "x" * 300_000
    server.watches = [
        [
            {"type": "ADDED", "object": {"text": long}},
            {"type": "ERROR", "object": {"code": 410, "message": "too old"}},
        ]
    ]

    async def test(client: KubeClient) -> None:
        seen = []

        async def follow() -> None:
            async for kind, body in client.watch("api/v1/pods", "1"):
                seen.append((kind, len(body["text"])))

        with pytest.raises(ExpiredError):
            await follow()
        assert seen == [("ADDED", 300_000)]

    run(server, test)


def test_a_deletion_that_the_watch_missed_is_found_by_the_next_list() -> None:
    """Protects from ghosts: pods that the operator would wait for, or count, for ever."""
    server = Server()
    server.answers = [
        (200, {"metadata": {"resourceVersion": "5"}, "items": [pod("a", "1"), pod("b", "2")]}),
        (200, {"metadata": {"resourceVersion": "9"}, "items": [pod("b", "3", 9)]}),  # b is another pod now
    ]
    server.watches = [[{"type": "ERROR", "object": {"code": 410, "message": "too old"}}]]
    woken: list[str] = []

    async def test(client: KubeClient) -> None:
        cache = ClusterCache(client, ("team",))
        cache.wake = woken.append
        task = asyncio.create_task(cache._pod_informers[0].run())
        await cache.synced()
        while {one.uid for one in cache.pods("team", "j")} != {"3"}:
            await asyncio.sleep(0.01)
        task.cancel()
        assert set(woken) == {"j"}

    run(server, test)


def test_a_job_has_the_pods_that_it_made_and_no_others() -> None:
    """Whoever may create pods can label them as another's, and the operator tells a job's pods the job's token."""
    own, labelled, foreign, elsewhere = (pod("run-4-2", uid) for uid in ("own", "labelled", "foreign", "elsewhere"))
    labelled["metadata"]["ownerReferences"][0]["controller"] = False
    del foreign["metadata"]["ownerReferences"]
    elsewhere["metadata"]["namespace"] = "evil"  # an owner reference can be forged where its owner is not
    server = Server()
    server.answers = [(200, {"metadata": {"resourceVersion": "5"}, "items": [own, labelled, foreign, elsewhere]})]

    async def test(client: KubeClient) -> None:
        cache = ClusterCache(client, ())
        task = asyncio.create_task(cache._pod_informers[0].run())
        await cache.synced()
        task.cancel()
        assert [one.uid for one in cache.pods("team", "j")] == ["own"]

    run(server, test)


def test_pods_are_trimmed_to_what_plans_look_at() -> None:
    running = {"name": "trainer", "restartCount": 2, "state": {"running": {}}}
    uid, view = trim_pod(pod("run-4-2", "u", podIP="10.0.0.7", phase="Running", containerStatuses=[running]))
    assert (uid, view.ordinal, view.incarnation, view.node) == ("j", 4, 2, "node-a")
    assert (view.address, view.running, view.restarts) == ("10.0.0.7:29400", True, 2)
    assert view.tls is False  # as pods of the version before: they say nothing of it
    assert trim_pod(pod("run-4-2", "u", podIP="fd00::7"))[1].address == "[fd00::7]:29400"

    made = {
        "containers": [{"name": "sidecar", "image": "proxy:1"}, {"name": "trainer", "image": "registry/trainer:dev"}]
    }
    runs = {**running, "imageID": "registry/trainer@sha256:0a1b"}
    manifest = pod("run-4-2", "u", containerStatuses=[runs])
    manifest["spec"] |= made
    view = trim_pod(manifest)[1]
    assert (view.image, view.image_id) == ("registry/trainer:dev", "registry/trainer@sha256:0a1b")

    waiting = {"name": "trainer", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    view = trim_pod(pod("run-4-2", "u", containerStatuses=[waiting]))[1]
    assert (view.waiting, view.message, view.running) == ("ImagePullBackOff", "no such image", False)


def test_a_pod_that_its_kubelet_refused_differs_from_one_that_ran_and_failed() -> None:
    """The kubelet writes a phase, a reason and a message of a pod that it does not admit, and nothing of containers."""
    why = {"reason": "OutOfnvidia.com/gpu", "message": "Pod was rejected: Node didn't have enough resource"}
    refused = trim_pod(pod("run-4-2", "u", phase="Failed", **why))[1]
    assert refused.ended
    assert refused.refused == "OutOfnvidia.com/gpu: Pod was rejected: Node didn't have enough resource"
    ran = {"name": "trainer", "state": {"terminated": {"exitCode": 137}}}
    evicted = {"reason": "Evicted", "message": "The node was low on resource: memory."}
    view = trim_pod(pod("run-4-2", "u", phase="Failed", containerStatuses=[ran], **evicted))[1]
    assert (view.ended, view.refused, view.message) == (True, "", "The node was low on resource: memory.")
    assert trim_pod(pod("run-4-2", "u", phase="Pending"))[1].refused == ""


@pytest.mark.parametrize(
    ("ready", "taint", "expected"),
    [
        ("True", None, (True, False)),
        ("False", None, (False, False)),
        ("Unknown", None, (False, False)),
        ("True", "unreachable", (False, False)),
        ("True", "out-of-service", (True, True)),
    ],
)
def test_nodes_are_trimmed_to_their_condition(ready: str, taint: str | None, expected: tuple[bool, bool]) -> None:
    taints = [{"key": f"node.kubernetes.io/{taint}"}] if taint else []
    manifest = {
        "metadata": {"name": "n"},
        "spec": {"taints": taints},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }
    node = trim_node(manifest)
    assert (node.ready, node.out_of_service) == expected
