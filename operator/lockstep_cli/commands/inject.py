"""``lockstep inject JOB``: a fault made on purpose in a job that runs, to see that it is found and mended."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import TYPE_CHECKING, Any

from lockstep_cli import target
from lockstep_cli.errors import CliError
from lockstep_cli.output import Output

if TYPE_CHECKING:
    from lockstep_cli.agents import Agents

_POLL_SECONDS = 0.2
_SITES = ("weight", "gradient", "optimizer", "activation", "product", "inputGradient")
_FLIP = ("layer", "bit", "element", "rate")


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inject", help="make a fault in a running job on purpose, where the administrator allows it"
    )
    target.add_arguments(parser)
    parser.add_argument("--rank", type=int, required=True, metavar="R", help="whose device has the fault")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--site", choices=_SITES, help="a bit flips there")
    what.add_argument("--slow", type=float, metavar="PERCENT", help="its own work takes so much longer")
    what.add_argument("--stall", action="store_true", help="it does not come to its next collective")
    what.add_argument(
        "--corrupt-shard", choices=("memory", "store"), help="a byte flips in its newest snapshot, or checkpoint"
    )
    what.add_argument("--clear", action="store_true", help="withdraw what was ordered of this rank")
    parser.add_argument("--layer", type=int, metavar="L", help="of the site (default: 0)")
    parser.add_argument("--bit", type=int, metavar="B", help="of the number that is hit (default: 30)")
    parser.add_argument("--element", type=int, metavar="E", help="which number is hit (default: 0)")
    parser.add_argument(
        "--rate", type=float, metavar="F", help="share of the micro-batches that are hit (default: 1; optimizer: steps)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="for so many steps (default: until --clear)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="give up then (default: 60)")
    parser.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Orders it, waits until it strikes, and says so."""
    wanted = order(arguments)
    answer = asyncio.run(_inject(arguments, wanted))
    output.result(answer, f"rank {arguments.rank}: {answer['what']}: {answer['message']}")
    return 0


def order(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The request; None where it takes none. Raises CliError."""
    given = {name: getattr(arguments, name) for name in _FLIP if getattr(arguments, name) is not None}
    if given and not arguments.site:
        raise CliError(f"--{min(given)}: it belongs to --site")
    lasting = {} if arguments.steps is None else {"steps": arguments.steps}
    if lasting and not (arguments.site or arguments.slow is not None):
        raise CliError("--steps: it belongs to --site and --slow")
    if arguments.clear or arguments.corrupt_shard:
        return None
    if arguments.stall:
        return {"kind": "stall"}
    if arguments.slow is not None:
        return {"kind": "slow", "share": arguments.slow / 100, **lasting}
    return {"kind": "flip", "site": arguments.site, **given, **lasting}


async def _inject(arguments: argparse.Namespace, wanted: dict[str, Any] | None) -> dict[str, Any]:
    from lockstep_cli import agents

    async with agents.connect(arguments) as connected:
        rank = arguments.rank
        size = connected.job.spec.nodes * connected.job.spec.gpus_per_node
        if not 0 <= rank < size:
            raise CliError(f"--rank {rank}: {connected.job.name} has the ranks 0 to {size - 1}")
        path = f"/v1/workers/{rank}/faults"
        if arguments.corrupt_shard:
            spoilt = await connected.ask("POST", rank, f"/v1/workers/{rank}/shards/{arguments.corrupt_shard}")
            return {**spoilt, "message": "done"}
        if wanted is None:
            return {**await connected.ask("DELETE", rank, path), "message": "withdrawn"}
        ordered = await connected.ask("POST", rank, path, wanted)
        status = await _struck(connected, rank, path, ordered["id"], time.monotonic() + arguments.timeout)
        return {**ordered, **status}


async def _struck(agents: Agents, rank: int, path: str, identity: str, deadline: float) -> dict[str, Any]:
    """How the worker has taken the order."""
    while True:
        status = await agents.ask("GET", rank, path)
        if status["id"] != identity:
            raise CliError(f"rank {rank}: the order was withdrawn by somebody else")
        if status["state"] == "refused":
            raise CliError(f"rank {rank}: {status['message']}")
        if status["state"] != "ordered":
            return status
        if time.monotonic() > deadline:
            raise CliError(
                f"--timeout: rank {rank} has begun no step since; the order stands, and strikes with its next step "
                "(--clear withdraws it)"
            )
        await asyncio.sleep(_POLL_SECONDS)  # the agent has nothing to wait on either: it looks at the worker's files
