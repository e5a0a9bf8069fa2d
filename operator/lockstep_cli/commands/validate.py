"""``lockstep validate FILE``: says everything that is wrong with a manifest."""

from __future__ import annotations

import argparse
from typing import Any

from lockstep_cli import manifest
from lockstep_cli.errors import ManifestError
from lockstep_cli.output import Output


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("validate", help="check a manifest without running it")
    parser.add_argument("file", metavar="FILE", help="TrainingJob manifest, - for standard input")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field of spec")
    parser.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Prints what the job would use, or every mistake."""
    try:
        job = manifest.load(arguments.file, arguments.set)
    except ManifestError as error:
        if not output.as_json and len(error.problems) > 1:
            for problem in error.problems:
                output.errors.print(f"{error.source}: {problem}", soft_wrap=True, markup=False)
            return error.status
        raise
    gpus = job.spec.nodes * job.spec.gpus_per_node
    output.result(
        {"valid": True, "name": job.name, "gpus": gpus, "spec": job.spec.to_wire()},
        f"{arguments.file}: {job.name} is valid: {job.spec.nodes} nodes × {job.spec.gpus_per_node} GPUs = {gpus} GPUs",
    )
    return 0
