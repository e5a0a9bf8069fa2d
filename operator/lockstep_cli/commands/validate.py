"""``lockstep validate FILE``: says everything that is wrong with a manifest."""

from __future__ import annotations

import argparse
from typing import Any

from lockstep_api.v1alpha1.widths import obstacle
from lockstep_cli import manifest, runnable
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
        job = runnable.checked(manifest.load(arguments.file, arguments.set), arguments.file)
    except ManifestError as error:
        if not output.as_json and len(error.problems) > 1:
            for problem in error.problems:
                output.errors.print(f"{error.source}: {problem}", soft_wrap=True)
            return error.status
        raise
    spec = job.spec
    gpus = spec.nodes * spec.gpus_per_node
    answer = {"valid": True, "name": job.name, "gpus": gpus, "spec": spec.to_wire()}
    text = f"{arguments.file}: {job.name} is valid: {spec.nodes} nodes × {spec.gpus_per_node} GPUs = {gpus} GPUs"
    if elastic := spec.resilience.elastic:
        widths = [nodes for nodes in range(elastic.min_nodes, spec.nodes + 1) if obstacle(spec, nodes) is None]
        answer["nodes"] = widths
        text += f"; it can train on {', '.join(map(str, widths))} nodes"
    output.result(answer, text)
    return 0
