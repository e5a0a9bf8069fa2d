"""``lockstep nodes``: which nodes jobs had trouble with, which are excluded; exclude one, or clear it."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from lockstep_cli.errors import CliError
from lockstep_cli.output import Output

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86_400.0}


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command and what it can do."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "nodes", help="show nodes that jobs had trouble with; exclude or clear one"
    )
    _where(parser)
    parser.set_defaults(handler=show)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    exclude = actions.add_parser("exclude", help="keep new pods of all jobs away from a node")
    exclude.add_argument("node", metavar="NODE", help="name of the node")
    exclude.add_argument(
        "--for", dest="length", metavar="TIME", help="30m, 12h, 7d; default: until `lockstep nodes clear`"
    )
    exclude.add_argument("--reason", default="", metavar="TEXT", help="for those who come after you")
    exclude.set_defaults(handler=shut)
    clear = actions.add_parser("clear", help="use a node again, and forget its faults")
    clear.add_argument("node", metavar="NODE", help="name of the node")
    clear.set_defaults(handler=use)
    for action in (exclude, clear):
        _where(action, default=argparse.SUPPRESS)
        action.add_argument("--output", choices=("text", "json"), default=argparse.SUPPRESS, help="form of the answer")
    return parser


def _where(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "-n", "--namespace", default=default, help="namespace of the operator; default: it is looked for in all"
    )
    parser.add_argument(
        "--kubeconfig", default=default, help="default: $KUBECONFIG, then ~/.kube/config, then the pod's own account"
    )


def show(arguments: argparse.Namespace, output: Output) -> int:
    """Lists the nodes, the worst first."""
    from lockstep_cli import nodes

    stored = asyncio.run(nodes.fetch(arguments))
    now = time.time()
    output.result(nodes.wire(stored.records, now), nodes.table(stored.records, now))
    return 0


def shut(arguments: argparse.Namespace, output: Output) -> int:
    """Excludes a node."""
    from lockstep_cli import nodes

    now = time.time()
    until = None if arguments.length is None else now + seconds(arguments.length)
    asyncio.run(nodes.exclude(arguments, arguments.node, arguments.reason or "by hand", until, now))
    text = f"{arguments.node}: no new pod of a job goes there {nodes.ending(until)}. Pods that run there stay."
    output.result({"node": arguments.node, "excluded": True, "until": until and nodes.rfc3339(until)}, text)
    return 0


def use(arguments: argparse.Namespace, output: Output) -> int:
    """Clears a node."""
    from lockstep_cli import nodes

    asyncio.run(nodes.clear(arguments, arguments.node, time.time()))
    text = f"{arguments.node}: its faults are forgotten, and new pods may go there."
    output.result({"node": arguments.node, "excluded": False}, text)
    return 0


def seconds(text: str) -> float:
    """Seconds of ``30m``, ``12h`` or ``7d``; raises CliError."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.isdigit() or int(number) == 0:
        raise CliError(f"--for {text}: give a number and a unit, such as 30m, 12h or 7d")
    return int(number) * _UNITS[unit]
