"""``lockstep logs JOB``: what the workers say, of one rank or of all."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from lockstep_cli import locallogs, target
from lockstep_cli.errors import CliError
from lockstep_cli.output import Output


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("logs", help="show the output of a job's workers")
    target.add_arguments(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="only this rank (default: all)")
    parser.add_argument("--tail", type=int, default=None, metavar="N", help="only the last N lines of each pod")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on with new lines until Ctrl-C or the job's end"
    )
    parser.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Prints lines as they are: a JSON object per line in JSON mode."""
    if arguments.tail is not None and arguments.tail < 1:
        raise CliError(f"--tail {arguments.tail}: write a number of lines from 1")
    wanted = locallogs.Wanted(arguments.rank, arguments.tail, arguments.follow)
    if target.is_local(arguments.job):
        locallogs.show(Path(arguments.job), wanted, output)
        return 0
    from lockstep_cli import clusterlogs

    asyncio.run(clusterlogs.show(arguments, wanted, output))
    return 0
