"""The command line: ``lockstep``, and ``kubectl lockstep`` through the ``kubectl-lockstep`` entry.

Exit status: 0 done, 1 an error (one sentence on standard error), 2 a wrong manifest or wrong usage, 130 Ctrl-C,
141 whoever read the output went away, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence

from lockstep_cli.commands import (
    checkpoint,
    data,
    inject,
    logs,
    model,
    nodes,
    preflight,
    profile,
    report,
    run,
    status,
    submit,
    validate,
    why,
)
from lockstep_cli.errors import CliError, ManifestError
from lockstep_cli.output import Output

_COMMANDS = (
    run,
    validate,
    submit,
    status,
    why,
    logs,
    report,
    profile,
    inject,
    checkpoint,
    model,
    data,
    nodes,
    preflight,
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="lockstep", description="Distributed training that accounts for every GPU-second."
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        command = module.register(commands)
        command.add_argument("--output", choices=("text", "json"), default="text", help="form of the answer")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        status = _command(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `lockstep logs … | head`
        _mute()
        return 141  # as of a process that SIGPIPE has ended
    return status


def _command(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    output = Output.open(arguments.output)
    try:
        return int(arguments.handler(arguments, output))
    except CliError as error:
        _complain(error, output)
        return error.status
    except KeyboardInterrupt:
        return 130
    except asyncio.CancelledError:  # SIGTERM, after `run` has cleaned up
        return 143


def _mute() -> None:
    """Nobody reads: what is still in buffers goes nowhere, where the interpreter would complain of it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _complain(error: CliError, output: Output) -> None:
    if output.as_json:
        problems = error.problems if isinstance(error, ManifestError) else [str(error)]
        sys.stdout.write(json.dumps({"error": str(error), "problems": problems}, indent=2) + "\n")
    sys.stderr.write(f"lockstep: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
