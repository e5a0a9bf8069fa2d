"""Finds the checkpoints that a command speaks of, and asks the trainer's process for what needs torch."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lockstep_api.v1alpha1 import S3Spec, TrainingJob
from lockstep_cli import store, target
from lockstep_cli.errors import CliError, NotFoundError
from lockstep_cli.output import Output

if TYPE_CHECKING:
    from lockstep_trainer.storage.store import ObjectStore

TOOL = "lockstep_trainer.checkpoint.tool"


@dataclass(frozen=True, slots=True)
class Where:
    """Where to look. ``step`` is the folder that the URI points at, "" where it names none."""

    uri: str
    s3: S3Spec
    step: str
    job: TrainingJob | None

    def open(self) -> ObjectStore:
        """The store; nothing is contacted yet."""
        from lockstep_trainer.storage.store import open_store

        return open_store(self.uri, self.s3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoints, and how their store is reached."""
    parser.add_argument(
        "where",
        metavar="URI|JOB",
        help="s3://bucket/prefix, file:///folder or a plain path: of jobs, a job, a step folder or its manifest.json; "
        "or name of a TrainingJob, or the folder of a local run",
    )
    parser.add_argument("--endpoint", help="URL of the S3 server, as seen from here (default: $AWS_ENDPOINT_URL_S3)")
    parser.add_argument("--region", help="region of the bucket (default: $AWS_REGION, then us-east-1)")
    parser.add_argument(
        "--path-style", action="store_true", help="bucket in the path of addresses; always so with --endpoint"
    )
    target.add_cluster_arguments(parser)
    parser.add_argument("--output", choices=("text", "json"), default=argparse.SUPPRESS, help="form of the answer")


def find(arguments: argparse.Namespace) -> Where:
    """What the arguments name; raises CliError."""
    from lockstep_trainer.checkpoint.catalogue import split

    name: str = arguments.where
    job: TrainingJob | None = None
    s3 = S3Spec()
    if "://" in name:
        uri = name
    elif target.is_local(name) or not (os.sep in name or Path(name).exists()):
        job = target.find(argparse.Namespace(**{**vars(arguments), "job": name}))
        uri = store.run_uri(job)
        s3 = job.spec.checkpoint.s3 if job.spec.checkpoint else s3
    else:
        uri = store.as_uri(name)
    if uri.startswith("file://") and not store.folder_of(uri).exists():
        raise NotFoundError(f"{uri}: no such folder")
    root, step = split(uri)
    return Where(root, _reached(s3, arguments), step, job)


def _reached(s3: S3Spec, arguments: argparse.Namespace) -> S3Spec:
    """How the store is reached from here: arguments, then the job, then the environment."""
    environment = os.environ
    endpoint = (
        arguments.endpoint
        or s3.endpoint
        or environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
    )
    region = arguments.region or (
        environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") if s3 == S3Spec() else None
    )
    changes: dict[str, Any] = {"endpoint": endpoint, "secret_ref": None}
    changes["path_style"] = s3.path_style or arguments.path_style or bool(arguments.endpoint)
    return s3.model_copy(update=changes | ({"region": region} if region else {}))


@contextmanager
def sentences(uri: str) -> Iterator[None]:
    """The trainer's errors as those of this tool, which speaks of the store at ``uri``."""
    from lockstep_trainer.errors import TrainerError

    advice = "from here credentials come from the environment or ~/.aws, and --endpoint names a server of your own"
    try:
        with store.sentences(uri, advice):
            yield
    except TrainerError as error:
        raise CliError(str(error)) from None


def ask(request: dict[str, Any], what: str, output: Output) -> dict[str, Any]:
    """Run the trainer's process on ``request``, with a progress bar where there is a terminal; raises CliError."""
    answer: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as trouble,  # a pipe that nobody reads would stop it
        _bar(output) as bar,
        subprocess.Popen(
            [sys.executable, "-m", TOOL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=trouble, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended already, and has said why
            process.stdin.write(json.dumps(request))
            process.stdin.close()
        task = bar.add_task(what, total=None)
        for line in process.stdout:
            answer = json.loads(line)
            if "total" in answer:
                bar.update(task, total=answer["total"])
            elif "done" in answer:
                bar.update(task, completed=answer["done"])
        trouble.seek(0)
        said = trouble.read().strip()
    if "error" in answer:
        raise CliError(answer["error"])
    if "result" not in answer:
        raise CliError(f"{what} ended with status {process.returncode}: {said or 'it said nothing'}")
    result: dict[str, Any] = answer["result"]
    return result


def _bar(output: Output) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=output.errors,
        transient=True,
        disable=output.as_json or not output.errors.is_terminal,
    )
