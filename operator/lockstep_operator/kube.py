"""A thin asynchronous client of the Kubernetes API: what the operator and the command-line tool need, and no more.

Credentials come from the pod's service account or from a kubeconfig. Requests that the server can't answer now (429,
5xx, no connection) are tried again for a few seconds; everything that is written can be repeated safely, since
creation has fixed names, patches carry a resource version and deletion carries a uid.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import aiohttp
import kopf

from lockstep_api import constants
from lockstep_operator.errors import (
    AlreadyExistsError,
    ApiError,
    ConfigError,
    ConflictError,
    ExpiredError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)

log = logging.getLogger(__name__)

Manifest = dict[str, Any]

PAGE = 500
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.1
REQUEST_SECONDS = 30.0
WATCH_SECONDS = 290
"""The server ends a watch after so long; below the five minutes at which proxies cut idle connections."""
SILENCE_SECONDS = 90.0
"""A watch without a word is dead: bookmarks come every minute."""

MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
"""Merges lists whose entries have names, of Kubernetes' own kinds."""
JSON_PATCH = "application/json-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object, as it is spelled in URLs."""

    api: str  # "api/v1" or "apis/<group>/<version>"
    plural: str

    def path(self, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
        """The URL's path. Without a namespace: of all namespaces, or of a cluster-wide object."""
        parts = [self.api, *(("namespaces", namespace) if namespace else ()), self.plural]
        return "/".join([*parts, *filter(None, (name, sub))])


PODS = Resource("api/v1", "pods")
NODES = Resource("api/v1", "nodes")
SERVICES = Resource("api/v1", "services")
SECRETS = Resource("api/v1", "secrets")
CONFIG_MAPS = Resource("api/v1", "configmaps")
EVENTS = Resource("api/v1", "events")
JOBS = Resource("apis/batch/v1", "jobs")
LEASES = Resource("apis/coordination.k8s.io/v1", "leases")
TRAINING_JOBS = Resource(f"apis/{constants.API_VERSION}", constants.PLURAL)


@dataclass(frozen=True, slots=True)
class Page:
    """A whole list, and the version to watch from."""

    items: list[Manifest]
    resource_version: str


@dataclass
class KubeClient:
    """Use as a context manager: ``async with KubeClient(credentials()) as client``."""

    connection: kopf.ConnectionInfo
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self.connection.as_ssl_context(), limit=0)
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    async def get(self, path: str) -> Manifest:
        """One object. Raises errors.NotFoundError."""
        return await self._request("GET", path)

    async def list(self, path: str, *, labels: str = "", fields: str = "") -> Page:
        """All objects, in pages of 500, so that the server never has to send one huge answer."""
        query = {"limit": str(PAGE), "labelSelector": labels, "fieldSelector": fields}
        items: list[Manifest] = []
        while True:
            answer = await self._request("GET", path, query={key: value for key, value in query.items() if value})
            items += answer.get("items") or []
            metadata = answer["metadata"]
            if not (token := metadata.get("continue")):
                return Page(items, metadata["resourceVersion"])
            query["continue"] = token

    async def watch(
        self, path: str, resource_version: str, *, labels: str = "", fields: str = ""
    ) -> AsyncIterator[tuple[str, Manifest]]:
        """(ADDED | MODIFIED | DELETED | BOOKMARK, object) until the server ends the watch. Raises
        errors.ExpiredError when the version is too old, errors.UnavailableError when the connection is lost."""
        query = {
            "watch": "true",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
            **({"labelSelector": labels} if labels else {}),
            **({"fieldSelector": fields} if fields else {}),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_SECONDS)
        try:
            async with self._open.get(
                self._url(path), params=query, headers=self._headers(), timeout=timeout
            ) as answer:
                if answer.status >= 400:
                    raise _error(answer.status, await answer.text())
                async for line in _lines(answer.content):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        raise _error(status.get("code", 500), json.dumps(status))
                    yield event["type"], event["object"]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(
                0, "Unreachable", f"watch of {path} was cut: {error or type(error).__name__}"
            ) from None

    async def create(self, path: str, body: Manifest, *, strict: bool = False) -> Manifest:
        """Create an object; ``strict``: fields that the server does not know are refused, not dropped. Raises
        errors.AlreadyExistsError, errors.RefusedError, and errors.ConflictError where two creations met at one quota:
        the same may be asked again."""
        try:
            return await self._request("POST", path, body, query={"fieldValidation": "Strict"} if strict else None)
        except ConflictError as error:
            if error.reason != "AlreadyExists":
                raise
            raise AlreadyExistsError(error.code, error.reason, error.message) from None

    async def replace(self, path: str, body: Manifest) -> Manifest:
        """Replace an object; its resourceVersion must be the current one. Raises errors.ConflictError."""
        return await self._request("PUT", path, body)

    async def patch(self, path: str, body: Any, kind: str = MERGE_PATCH) -> Manifest:
        """Patch an object. Raises errors.ConflictError, errors.NotFoundError."""
        return await self._request("PATCH", path, body, content_type=kind)

    async def apply(self, path: str, body: Manifest, manager: str = "lockstep") -> Manifest:
        """Server-side apply."""
        query = {"fieldManager": manager, "force": "true"}
        return await self._request("PATCH", path, body, content_type=APPLY_PATCH, query=query)

    async def delete(
        self,
        path: str,
        *,
        uid: str | None = None,
        grace: int | None = None,
        propagation: Literal["Background", "Foreground", "Orphan"] = "Background",
    ) -> None:
        """Delete an object, if it is still the one with that uid. Gone already is fine."""
        options: Manifest = {"propagationPolicy": propagation}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        try:
            await self._request("DELETE", path, options)
        except (NotFoundError, ConflictError):
            log.debug("%s is gone already", path)

    # ------------------------------------------------------------------------------------------- details

    @property
    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use `async with`"
        return self._session

    def _url(self, path: str) -> str:
        return f"{self.connection.server.rstrip('/')}/{path}"

    def _headers(self) -> dict[str, str]:
        return {"User-Agent": "lockstep", **self.connection.as_http_headers()}

    async def _request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        query: dict[str, str] | None = None,
    ) -> Manifest:
        data = None if body is None else json.dumps(body)
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._once(method, path, data, content_type=content_type, query=query)
            except UnavailableError as error:
                if attempt == ATTEMPTS:
                    raise
                log.debug("%s %s: %s; trying again", method, path, error)
            except _UnauthorizedError:
                if attempt == ATTEMPTS:
                    raise
                self.connection = await asyncio.to_thread(credentials)  # mounted tokens are renewed every hour
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause *= 2
        raise AssertionError("unreachable")

    async def _once(
        self, method: str, path: str, data: str | None, *, content_type: str, query: dict[str, str] | None
    ) -> Manifest:
        headers = {**self._headers(), "Content-Type": content_type}
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=5)
        try:
            async with self._open.request(
                method, self._url(path), data=data, headers=headers, params=query, timeout=timeout
            ) as answer:
                text = await answer.text()
                if answer.status >= 400:
                    raise _error(answer.status, text)
                parsed: Manifest = json.loads(text) if text else {}
                return parsed
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            server = self.connection.server
            raise UnavailableError(
                0, "Unreachable", f"{server} does not answer: {error or type(error).__name__}"
            ) from None


class _UnauthorizedError(ApiError):
    """401."""


def credentials() -> kopf.ConnectionInfo:
    """The pod's service account, or the kubeconfig that KUBECONFIG names (default: ~/.kube/config). Raises
    errors.ConfigError."""
    logger = logging.getLogger("kopf.login")
    settings = kopf.OperatorSettings()
    try:
        if not os.environ.get("KUBECONFIG"):
            found = kopf.login_with_service_account(logger=logger, settings=settings)
            if found is not None:
                return found
        found = kopf.login_with_kubeconfig(logger=logger, settings=settings)
    except (kopf.LoginError, OSError, KeyError, ValueError) as error:
        raise ConfigError(f"KUBECONFIG: the cluster's credentials can't be read: {error}") from None
    if found is None:
        raise ConfigError("no cluster: neither a service account nor a kubeconfig was found; set KUBECONFIG")
    return found


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length; the reader's own ``readline`` gives up at 128 KiB, which a large status exceeds."""
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


def _error(code: int, text: str) -> ApiError:
    try:
        status = json.loads(text)
        reason, message, own = status.get("reason", ""), status.get("message", text), status.get("kind") == "Status"
    except (ValueError, AttributeError):
        reason, message, own = "", text.strip(), False
    kind: type[ApiError] = {
        400: RefusedError if own else ApiError,  # proxies say it too, of a connection that they did not understand
        401: _UnauthorizedError,
        403: RefusedError,
        404: NotFoundError,
        409: ConflictError,
        410: ExpiredError,
        422: RefusedError,
        429: UnavailableError,
    }.get(code, UnavailableError if code >= 500 else ApiError)
    return kind(code, reason, message)
