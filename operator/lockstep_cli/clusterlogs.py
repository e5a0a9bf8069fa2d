"""Output of a job's pods in a cluster: the API server's pod logs, with the ranks' lines picked out."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_cli import cluster
from lockstep_cli.errors import CliError, ClusterError, NotFoundError
from lockstep_cli.locallogs import Wanted, emit
from lockstep_cli.output import Output
from lockstep_operator import kube
from lockstep_operator.kube import KubeClient


async def show(arguments: argparse.Namespace, wanted: Wanted, output: Output) -> None:
    """Prints the logs of the pod that has the wanted rank, or of all pods."""
    async with cluster.connect(arguments) as (client, namespace):
        job = await cluster.read_job(client, namespace, arguments.job)
        pods = _with_rank(job, await cluster.pods_of(client, namespace, job.name), wanted.rank)
        if not pods:
            _no_pods(job, wanted)
        names = [pod["metadata"]["name"] for pod in pods]
        if wanted.follow:
            await asyncio.gather(*(_follow(client, namespace, name, wanted, output) for name in names))
            return
        for name in names:
            lines = [line async for line in log_lines(client, namespace, name, follow=False)]
            for line in wanted.select(lines):
                emit(name, line, output)


def _with_rank(job: TrainingJob, pods: list[dict[str, Any]], rank: int | None) -> list[dict[str, Any]]:
    if rank is None:
        return pods
    last = job.spec.nodes * job.spec.gpus_per_node - 1
    if not 0 <= rank <= last:
        raise CliError(f"--rank {rank}: {job.name} has the ranks 0 to {last}")
    return [pod for pod in pods if cluster.slot_of(pod) == rank // job.spec.gpus_per_node]


def _no_pods(job: TrainingJob, wanted: Wanted) -> None:
    """Says where the last words of pods that are gone are kept; raises NotFoundError where nowhere."""
    kept = [fault for fault in job.status.faults if fault.log_tail and wanted.rank in (None, fault.rank)]
    if not kept:
        raise NotFoundError(
            f"{job.name}: no pod there now (phase {job.status.phase}); `lockstep why {job.name}` says why"
        )
    for fault in kept:
        for line in fault.log_tail:
            sys.stdout.write(f"[fault at {fault.at} rank {fault.rank}] {line}\n")


async def _follow(client: KubeClient, namespace: str, pod: str, wanted: Wanted, output: Output) -> None:
    """Prints lines as they come, until the pod is gone."""
    try:
        async for line in log_lines(client, namespace, pod, follow=True, tail=wanted.tail):
            if wanted.matches(line):
                emit(pod, line, output)
                sys.stdout.flush()
    except NotFoundError:
        return


async def log_lines(
    client: KubeClient, namespace: str, pod: str, *, follow: bool, tail: int | None = None
) -> AsyncIterator[str]:
    """What the pod's container `trainer` wrote; raises NotFoundError, ClusterError."""
    query = {"container": constants.CONTAINER_NAME, "follow": str(follow).lower()}
    if tail is not None:
        query["tailLines"] = str(tail)
    try:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=client.connection.as_ssl_context()),
            headers=dict(client.connection.as_http_headers()),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        ) as session:
            url = f"{client.connection.server.rstrip('/')}/{kube.PODS.path(namespace, pod, 'log')}"
            async with session.get(url, params=query) as answer:
                if answer.status == 404:
                    raise NotFoundError(f"pod {pod} is gone")
                if answer.status >= 400:
                    raise ClusterError(f"the log of {pod} can't be read: {(await answer.json())['message']}")
                rest = b""
                async for chunk in answer.content.iter_any():
                    *whole, rest = (rest + chunk).split(b"\n")
                    for line in whole:
                        yield line.decode(errors="replace")
                if rest:
                    yield rest.decode(errors="replace")
    except aiohttp.ClientError as error:
        raise ClusterError(f"the log of {pod} can't be read: {error or type(error).__name__}") from None
