"""``lockstep status JOB``: how far a job is."""

from __future__ import annotations

import argparse
import time
from typing import Any

from lockstep_cli import statustable, target
from lockstep_cli.output import Output


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("status", help="show how far a job is")
    target.add_arguments(parser)
    parser.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Prints the job's status."""
    job = target.find(arguments)
    output.result(target.wire(job), statustable.table(job, time.time()))
    return 0
