"""``lockstep why JOB``: what a job is doing and why, in a sentence or two."""

from __future__ import annotations

import argparse
import time
from typing import Any

from lockstep_cli import explain, target
from lockstep_cli.output import Output


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("why", help="say what a job is doing, and why")
    target.add_arguments(parser)
    parser.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Prints the sentences."""
    job = target.find(arguments)
    sentence = explain.why(job, time.time(), local=target.is_local(arguments.job))
    output.result({"job": job.name, "phase": job.status.phase, "why": sentence}, sentence)
    return 0
