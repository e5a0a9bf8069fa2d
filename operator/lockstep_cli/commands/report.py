"""``lockstep report``: one HTML file that tells a run's whole story, from its journal."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep_api.v1alpha1 import S3Spec, TrainingJob
from lockstep_cli import journal, store, target
from lockstep_cli.errors import CliError
from lockstep_cli.output import Output
from lockstep_cli.report import faults, page


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("report", help="write a run's report as one HTML file")
    parser.add_argument("job", metavar="JOB", nargs="?", help="name of a TrainingJob, or the folder of a local run")
    parser.add_argument("--uri", help="read the journal here instead: s3://bucket/prefix, file:///folder")
    parser.add_argument("--endpoint", help="URL of the S3 server, as seen from here (path-style addresses)")
    parser.add_argument("-o", "--file", default="report.html", help="file to write (default: report.html)")
    target.add_cluster_arguments(parser)
    parser.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Writes the report."""
    if (arguments.job is None) == (arguments.uri is None):
        raise CliError("report: give either JOB or --uri")
    job = None if arguments.job is None else target.find(arguments)
    uri = arguments.uri if job is None else store.run_uri(job)
    s3 = job.spec.checkpoint.s3 if job and job.spec.checkpoint else S3Spec()
    if arguments.endpoint:
        s3 = s3.model_copy(update={"endpoint": arguments.endpoint, "path_style": True})
    path = Path(arguments.file)
    written = write(path, uri, s3, job)
    told = written.told
    choice = f", the newest of {written.runs} runs below {uri}" if written.runs > 1 else ""
    output.result(
        {
            "report": str(path),
            "run": written.run,
            "steps": len(told.lineage),
            "faults": len(told.faults),
            "goodput": told.goodput,
        },
        f"{path}: {len(told.lineage)} steps, {len(told.faults)} faults of {written.run}{choice}",
    )
    return 0


@dataclass(frozen=True, slots=True)
class Written:
    """What a report tells, and of which run."""

    told: journal.Journal
    run: str  # its URI
    runs: int  # that there are where it was looked for


def write(path: Path, uri: str, s3: S3Spec | None, job: TrainingJob | None) -> Written:
    """Reads the journal of the newest run below ``uri`` and writes the report to ``path``; raises CliError."""
    source = store.open_uri(uri, s3)
    runs = store.find_runs(source, uri)
    prefix = runs[0]
    told = journal.fold(journal.read(source, prefix))
    if job:
        told = faults.with_status(told, job.status.faults)
    name = job.name if job else _name(prefix or uri)
    run = f"{uri.rstrip('/')}/{prefix}"
    heading = page.Heading(name, run, job.status.phase if job else None)
    ledger = {journal.plain_class(k): v for k, v in job.status.ledger.items()} if job else None
    try:
        path.write_text(page.render(told, heading, ledger or None))
    except OSError as error:
        raise CliError(f"{path}: can't be written: {error.strerror}; choose another file with -o") from None
    return Written(told, run, len(runs))


def _name(prefix: str) -> str:
    """The job's name in …/<namespace>/<job>/<uid>/."""
    parts = prefix.strip("/").split("/")
    return parts[-2] if len(parts) > 1 else parts[-1]
