"""Finds the job that a command speaks of: a name in the cluster, or the folder of a ``lockstep run``."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lockstep_api.v1alpha1 import TrainingJob
from lockstep_cli.errors import CliError

JOB_FILE = "status.json"
"""In the folder of a local run: the job, its status kept up to date."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """JOB, and which cluster it is in."""
    parser.add_argument("job", metavar="JOB", help="name of a TrainingJob, or the folder of a local run")
    add_cluster_arguments(parser)


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cluster and namespace."""
    parser.add_argument("-n", "--namespace", help="namespace; default: the kubeconfig's")
    parser.add_argument("--kubeconfig", help="default: $KUBECONFIG, then ~/.kube/config, then the pod's own account")


def is_local(name: str) -> bool:
    """Whether ``name`` is the folder of a local run."""
    return (Path(name) / JOB_FILE).is_file()


def not_local(name: str) -> str:
    """That ``name`` is not the folder of a local run, as a clause."""
    if Path(name).is_dir():
        return f"{name} is no folder of a local run (it would hold {JOB_FILE})"
    return f"{name} is a file and no folder of a local run" if Path(name).exists() else f"there is no folder {name}"


def find(arguments: argparse.Namespace) -> TrainingJob:
    """The job as it stands; raises CliError."""
    if is_local(arguments.job):
        return load_local(Path(arguments.job))
    if os.sep in arguments.job:
        raise CliError(not_local(arguments.job))
    from lockstep_cli import cluster

    return asyncio.run(cluster.get_job(arguments))


def load_local(folder: Path) -> TrainingJob:
    """The job of a local run, with its newest status."""
    try:
        return TrainingJob.model_validate_json((folder / JOB_FILE).read_text())
    except (OSError, ValueError, ValidationError) as error:
        raise CliError(f"{folder / JOB_FILE}: can't be read: {error}") from None


def wire(job: TrainingJob) -> dict[str, Any]:
    """The job as JSON."""
    return job.to_wire()
