"""``lockstep submit FILE``: creates the job in the cluster, or updates the one that is there."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from lockstep_cli import manifest, runnable, target
from lockstep_cli.output import Output


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("submit", help="create a job in the cluster")
    parser.add_argument("file", metavar="FILE", help="TrainingJob manifest, - for standard input")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field of spec")
    target.add_cluster_arguments(parser)
    parser.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Checks the manifest here, then hands it to the API server as it was written: defaults are the server's."""
    from lockstep_cli import cluster

    document = manifest.override(manifest.read(arguments.file), arguments.set)
    runnable.checked(manifest.parse(document, arguments.file), arguments.file)
    created = asyncio.run(cluster.submit(document, arguments))
    output.result(
        {"job": created.name, "namespace": created.namespace, "uid": created.uid},
        f"{created.name} submitted; follow it with: lockstep status -n {created.namespace} {created.name}",
    )
    return 0
