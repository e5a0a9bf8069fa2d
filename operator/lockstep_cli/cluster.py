"""What the tool asks of a cluster: a job, its pods, the creation of one. Errors become sentences here, once."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pydantic import ValidationError

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_cli import target
from lockstep_cli.errors import CliError, ClusterError, NotFoundError
from lockstep_operator import errors, kube
from lockstep_operator.kube import KubeClient

FIELD_MANAGER = "lockstep-cli"


@asynccontextmanager
async def connect(arguments: argparse.Namespace) -> AsyncIterator[tuple[KubeClient, str]]:
    """A client and the namespace to look in. Raises ClusterError for whatever the cluster does not do.

    Where there is no cluster, a command that takes a folder in place of a job may have meant one: both are said.
    """
    job = getattr(arguments, "job", None)
    meant = f"{target.not_local(job)}, and " if job else ""
    if arguments.kubeconfig:
        os.environ["KUBECONFIG"] = arguments.kubeconfig
    try:
        connection = kube.credentials()
        async with KubeClient(connection) as client:
            yield client, arguments.namespace or connection.default_namespace or "default"
    except errors.RefusedError as error:
        raise ClusterError(f"the cluster refused: {error}") from None
    except errors.UnavailableError as error:
        raise ClusterError(f"{meant}{error}; is the cluster up, and KUBECONFIG right?") from None
    except errors.OperatorError as error:
        raise ClusterError(f"{meant}{error}") from None


async def get_job(arguments: argparse.Namespace) -> TrainingJob:
    """The job that the command names; raises NotFoundError, ClusterError."""
    async with connect(arguments) as (client, namespace):
        return await read_job(client, namespace, arguments.job)


async def read_job(client: KubeClient, namespace: str, name: str) -> TrainingJob:
    """A job; raises NotFoundError."""
    try:
        found = await client.get(kube.TRAINING_JOBS.path(namespace, name))
    except errors.NotFoundError:
        raise NotFoundError(
            f"{target.not_local(name)}, and no such TrainingJob in namespace {namespace}; -n names another, "
            "and a missing definition means that Lockstep is not installed (helm install lockstep charts/lockstep)"
        ) from None
    try:
        return TrainingJob.of_server(found)
    except ValidationError as error:
        raise CliError(f"{name}: the job is of another version of Lockstep than this tool: {error}") from None


async def submit(document: dict[str, Any], arguments: argparse.Namespace) -> TrainingJob:
    """Applies a manifest as it is written; the job as the server has it."""
    async with connect(arguments) as (client, namespace):
        own = document.get("metadata", {}).get("namespace")
        if own and arguments.namespace and own != arguments.namespace:
            raise CliError(f"metadata.namespace: {own} in the manifest, but -n {arguments.namespace}; leave one out")
        path = kube.TRAINING_JOBS.path(own or namespace, document["metadata"]["name"])
        try:
            return TrainingJob.of_server(await client.apply(path, document, FIELD_MANAGER))
        except errors.NotFoundError:
            raise NotFoundError(
                "the cluster knows no TrainingJob, or not that namespace; install Lockstep with "
                "`helm install lockstep charts/lockstep`, make the namespace with `kubectl create namespace`"
            ) from None


async def pods_of(client: KubeClient, namespace: str, job: str) -> list[dict[str, Any]]:
    """The job's pods, by slot; those without one last."""
    page = await client.list(kube.PODS.path(namespace), labels=f"{constants.LABEL_JOB_NAME}={job}")
    return sorted(page.items, key=lambda pod: (slot_of(pod) is None, slot_of(pod) or 0, pod["metadata"]["name"]))


def slot_of(pod: dict[str, Any]) -> int | None:
    """The slot that a pod holds."""
    slot = pod["metadata"].get("labels", {}).get(constants.LABEL_SLOT)
    return int(slot) if slot is not None else None
