"""Checkpoints beside training: Lockstep's, torch's async_save in a thread and in a process, s3torchconnector's writer.

    PYTHONPATH=tests OMP_NUM_THREADS=1 .venv/bin/python tests/bench/checkpoint.py [--rounds 5]

Two ranks on this machine train a small sharded decoder; an agent runs beside them as in a pod, and all systems write
the same state to one S3 server on loopback (versitygw, on a disk of this machine). With --megabits it is behind a link
that carries so much, as root: the ranks, the agent and the server share the processors, and on loopback these are what
limits all transfers. In each round every system saves once, in an order drawn with a seed: some steps without a save,
then one, and the steps beside it until it is durable.

* blocked: that the loop stands still, the call and the wait before the optimizer, on the rank where it is longest;
* slowdown: of the steps until it is durable beside the round's steps without a save, without what was blocked; and the
  CPU seconds that ranks, their children and the agent used beyond those of the steps;
* durable: from the boundary until all is in the store, for Lockstep until it is committed and ``latest`` names it;
* restore: into the live state, which was set to zero and is compared afterwards, from the rank's own memory, from a
  buddy (its agent's HTTP server on loopback, checksums on both ends, then own memory) and from S3. Restoring from a
  live replica is not built yet.

Two raw transfers stand beside them, the same bytes by Lockstep's client and nothing else: alone, and beside steps. The
first saves of each system, which make its memory, plans and processes, are given apart. torch has no S3 writer of its
own, so its saves go through s3torchconnector, which is no dependency of Lockstep: ``uv pip install
's3torchconnector[dcp]'``; without it Lockstep alone is measured, and the result says so. The result is added to
docs/results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import tempfile
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peers.agent import Agent, buddy
from peers.judge import judge, table
from peers.rounds import Place, Rounds, Settings
from peers.store import serving
from peers.torchsave import is_there
from peers.training import Size

from forked import run_ranks, start_all, wait_all

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs/results/checkpoint.json"
RANKS = 2
MEMORY = Path("/dev/shm")
_TIMEOUT = 1200.0  # seconds of a collective: others may be using the machine


def measure(settings: Settings, megabits: float | None) -> dict[str, Any]:
    """Run it all; what the ranks found. ``megabits``: a second that get to the S3 server."""
    with (
        tempfile.TemporaryDirectory() as disk,
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as memory,
        serving(Path(disk), megabits=megabits) as server,
        socket.socket() as listening,
    ):
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        run, fetched, other = (Path(memory) / name for name in ("run", "fetched", "buddy"))
        host, port = listening.getsockname()
        ours, agents = Pipe()

        def agent() -> None:
            ours.close()
            Agent(server, run, fetched, RANKS, f"{host}:{port}").serve(agents)

        pids = start_all([agent, partial(buddy, other, RANKS, listening)])
        agents.close()
        place = Place(server, run, fetched, pids[0], Path(disk) / "result.json")
        try:
            run_ranks(RANKS, partial(_rank, settings, place, ours), timeout=_TIMEOUT)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            wait_all(pids)
        found: dict[str, Any] = json.loads(place.result.read_text())
        return found


def _rank(settings: Settings, place: Place, line: Connection, rank: int) -> None:
    # The process of async_save meets the other ranks' there.
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    Rounds(settings, place, line if rank == 0 else None).run()


def versions() -> dict[str, str | None]:
    """Of what is measured."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "boto3", "awscrt", "s3torchconnector"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--baseline-steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="that s3torchconnector's writer has on each rank")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=96, help="of a rank in a step")
    parser.add_argument("--megabits", type=float, help="a second, of the link to the S3 server; default: loopback")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not is_there():
        print("s3torchconnector is missing: Lockstep alone is measured. uv pip install 's3torchconnector[dcp]'")
    size = Size(arguments.dim, arguments.layers, arguments.vocab, arguments.tokens)
    settings = Settings(size, arguments.rounds, arguments.baseline_steps, arguments.threads, arguments.seed)
    load = [os.getloadavg()[0]]
    found = judge(measure(settings, arguments.megabits))
    load.append(os.getloadavg()[0])
    busy = max(load[0], load[1] - RANKS - 2) > (os.cpu_count() or 1) / 2
    result = {
        "what": "checkpoints of two ranks beside training, to S3: seconds, median, lowest and highest",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, text=True).strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, CPU and gloo, float32, {RANKS} ranks",
        "load": {"before": round(load[0], 1), "after": round(load[1], 1), "others used the machine": busy},
        "versions": versions(),
        "rounds": arguments.rounds,
        "size": {"dim": size.dim, "layers": size.layers, "vocab": size.vocab, "tokens": size.tokens},
        "writer_threads": arguments.threads,
        "megabits": arguments.megabits,
        **found,
        "left_out": ["restore from a live replica: not built yet"]
        + ([] if is_there() else ["async_save and s3torchconnector: not installed"]),
    }
    print(table(found))
    if busy:
        print(
            f"\nOthers used this machine: load {load[0]:.0f} before, {load[1]:.0f} after. Compare within the run only."
        )
    runs = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps([*runs, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
