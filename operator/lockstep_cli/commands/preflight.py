"""``lockstep preflight``: check nodes without a training job."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from lockstep_cli.errors import CliError
from lockstep_cli.output import Output


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "preflight", help="check nodes: GPUs, the links between them, the host; 1 where one is unfit"
    )
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="names of nodes")
    parser.add_argument("-l", "--selector", default="", help="and those with these labels")
    parser.add_argument("--image", required=True, help="the trainer image")
    parser.add_argument("--gpus", type=_count, default=8, help="GPUs of a node, all of which must be free; default: 8")
    parser.add_argument("--tier", choices=("Quick", "Full"), default="Full", help="default: Full")
    parser.add_argument("--timeout", type=float, default=600, help="seconds, images pulled included; default: 600")
    parser.add_argument("-n", "--namespace", help="where the Jobs are made; default: that of the kubeconfig")
    parser.add_argument("--kubeconfig", help="default: $KUBECONFIG, then ~/.kube/config, then the pod's own account")
    parser.set_defaults(handler=check)
    return parser


def check(arguments: argparse.Namespace, output: Output) -> int:
    """Runs the checks and prints one table; 0 where all nodes were checked and are fit."""
    from lockstep_cli import preflight

    if arguments.timeout <= 0:
        raise CliError(f"--timeout {arguments.timeout:g}: give a number of seconds above 0")
    checks = asyncio.run(preflight.run(arguments))
    output.result(preflight.wire(checks), preflight.table(checks))
    return 0 if all(one.report and not one.fatal for one in checks) else 1


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs; 0 checks the host alone")
    return int(text)
