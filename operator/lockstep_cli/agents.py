"""Talks to the agents of a job that runs: over loopback in a local run, through the API server's proxy in a cluster."""

from __future__ import annotations

import argparse
import base64
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from lockstep_api import constants
from lockstep_api.tls import CERTIFICATE_FILE, Material, Rotating, agents_name
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_cli import target
from lockstep_cli.errors import CliError, ClusterError, NotFoundError

_ANSWER_SECONDS = 30.0
_CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True)
class Agents:
    """The agents of one job, by slot."""

    job: TrainingJob
    addresses: dict[int, str]  # slot → URL, without a slash at the end
    session: aiohttp.ClientSession = field(repr=False)
    tls: ssl.SSLContext | bool = True

    async def ask(self, method: str, rank: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON answer of the agent that has ``rank``; {} for an empty one. Raises CliError."""
        async with self._open(method, rank, path, body) as answer:
            text = await answer.text()
            found: dict[str, Any] = json.loads(text) if text else {}
            return found

    async def download(self, rank: int, path: str, into: Path, progress: Callable[[int], None]) -> None:
        """Save a file; ``progress`` is told how many bytes have come. Raises CliError."""
        partial = into.with_name(f"{into.name}.part")
        async with self._open("GET", rank, path, None) as answer:
            with partial.open("wb") as file:
                async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
                    file.write(chunk)
                    progress(file.tell())
        partial.replace(into)

    @asynccontextmanager
    async def _open(
        self, method: str, rank: int, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        slot = rank // self.job.spec.gpus_per_node
        if slot not in self.addresses:
            raise NotFoundError(
                f"{self.job.name}: rank {rank} has no pod now (phase {self.job.status.phase}); try again once it runs"
            )
        url = f"{self.addresses[slot]}{path}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=_ANSWER_SECONDS)
        try:
            async with self.session.request(method, url, json=body, ssl=self.tls, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise _refusal(answer.status, await answer.text(), rank)
                yield answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(f"the agent of rank {rank} does not answer: {error or type(error).__name__}") from None


@asynccontextmanager
async def connect(arguments: argparse.Namespace) -> AsyncIterator[Agents]:
    """The agents of the job that the command names; raises CliError."""
    if target.is_local(arguments.job):
        async with _local(Path(arguments.job)) as agents:
            yield agents
    else:
        async with _in_cluster(arguments) as agents:
            yield agents


@asynccontextmanager
async def _local(folder: Path) -> AsyncIterator[Agents]:
    job = target.load_local(folder)
    _must_run(job)
    secret = folder / "token"
    try:
        token = (secret / constants.TOKEN_FILE).read_text().strip()
        material = Material.read(secret) if (secret / CERTIFICATE_FILE).exists() else None
    except OSError:
        raise NotFoundError(f"{folder}: the run has not started its pods yet; try again in a moment") from None
    tls = Rotating(material.client, agents_name(job.uid)) if material else True
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
        addresses: dict[int, str] = {}
        for file in sorted(folder.glob("pods/*.json")):
            pod = json.loads(file.read_text())
            url = f"{'https' if pod.get('tls') else 'http'}://{pod['address']}"
            slot = await _slot(session, url, tls)
            if slot is not None:
                addresses[slot] = url
        yield Agents(job, addresses, session, tls)


async def _slot(session: aiohttp.ClientSession, url: str, tls: ssl.SSLContext | bool) -> int | None:
    """The slot that an agent holds; None for a spare, and for one that is gone."""
    try:
        async with session.get(f"{url}/v1/inventory", ssl=tls, timeout=aiohttp.ClientTimeout(total=5)) as answer:
            slot: int | None = (await answer.json())["slot"]
            return slot
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
        return None


@asynccontextmanager
async def _in_cluster(arguments: argparse.Namespace) -> AsyncIterator[Agents]:
    from lockstep_cli import cluster
    from lockstep_operator import cache, errors, kube
    from lockstep_operator.plan import children, pods

    async with cluster.connect(arguments) as (client, namespace):
        job = await cluster.read_job(client, namespace, arguments.job)
        _must_run(job)
        try:
            secret = await client.get(kube.SECRETS.path(namespace, children.secret_name(job)))
        except errors.NotFoundError:
            raise NotFoundError(f"{job.name}: its pods have not been made yet; try again in a moment") from None
        port = pods.agent_port(job)
        addresses: dict[int, str] = {}
        for pod in await cluster.pods_of(client, namespace, job.name):
            slot = cluster.slot_of(pod)
            if slot is not None and "deletionTimestamp" not in pod["metadata"]:
                # The proxy does not verify the agent's certificate: its own network is trusted, as for every pod.
                scheme = "https:" if cache.trim_pod(pod)[1].tls else ""
                proxy = kube.PODS.path(namespace, f"{scheme}{pod['metadata']['name']}:{port}", "proxy")
                addresses[slot] = f"{client.connection.server.rstrip('/')}/{proxy}"
        headers = {
            **client.connection.as_http_headers(),
            constants.TOKEN_HEADER: base64.b64decode(secret["data"][constants.TOKEN_FILE]).decode().strip(),
        }
        async with aiohttp.ClientSession(headers=headers) as session:
            yield Agents(job, addresses, session, client.connection.as_ssl_context() or True)


def _must_run(job: TrainingJob) -> None:
    phase = job.status.phase
    if phase is not None and phase.terminal:
        raise CliError(f"{job.name}: has ended ({phase}); only a job that runs can be asked")
    if job.spec.trainer is None:
        raise CliError(f"{job.name}: runs spec.command; only Lockstep's own trainer can be asked")


def _refusal(status: int, text: str, rank: int) -> CliError:
    """An agent answers with a sentence, the API server with a Status."""
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        message = text.strip() or f"HTTP {status}"
    if status == 403:
        message += "; it takes get on the job's Secret, and get, create and delete on pods/proxy, as the role edit has"
    return NotFoundError(message) if status == 404 else CliError(f"rank {rank}: {message}")
