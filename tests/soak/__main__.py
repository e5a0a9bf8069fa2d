"""``python -m soak``: random faults on one job of the local cluster; exits 1 where something grows or is not exact.

    PYTHONPATH=tests:scripts python -m soak --minutes 60 --seed 1 --write

Brings the local cluster up if it isn't, and leaves it as it was. Faults come for so many minutes, or until the job has
done all its steps, whose number is set for about that time; then it is left alone to end. Prints a line per fault and
the sums; with --write, these go into docs/results/soak.json, and a picture into docs/results/soak.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.results import RESULTS, origin
from demonstration import install
from demonstration.target import Target
from e2e.jobs import BUCKET, NAMESPACE
from localcluster import Cluster
from soak.campaign import Plan, Soaked, soak
from soak.picture import draw
from soak.result import judge, result, table

RESULT = RESULTS / "soak.json"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="of faults, at most; default 60")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--gap", type=float, default=20, help="mean seconds between faults; default 20")
    parser.add_argument("--step-seconds", type=float, default=1.0, help="length of a step; default 1")
    parser.add_argument("--write", action="store_true", help="write docs/results/soak.json and soak.svg")
    arguments = parser.parse_args()
    plan = Plan(arguments.seed, arguments.minutes, arguments.gap, arguments.step_seconds)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    was_up = Cluster().exists
    cluster = Cluster.up(nodes=3, gpus=2)
    try:
        soaked = _run(cluster, folder, plan, console)
    except AssertionError as error:
        console.print(f"{error}\nreadings: {folder}")
        return 1
    finally:
        if not was_up:
            cluster.down()
    judged = judge(soaked.readings, plan)
    shown = result(soaked, judged)
    console.print(table(shown))
    console.print(f"readings: {folder}")
    if arguments.write:
        load = f"load {os.getloadavg()[2]:.1f} over its last 15 minutes"
        head = origin("random faults on one job of the local cluster", f"Python {platform.python_version()}, {load}")
        RESULT.write_text(json.dumps({**head, **shown}, indent=1, ensure_ascii=False) + "\n")
        draw(soaked, RESULT.with_suffix(".svg"))
        console.print(f"written to {RESULT}")
    return 1 if shown["problems"] else 0


def _run(cluster: Cluster, folder: Path, plan: Plan, console: Console) -> Soaked:
    target = Target.local(cluster)
    os.environ.update(AWS_ACCESS_KEY_ID=target.s3.access_key, AWS_SECRET_ACCESS_KEY=target.s3.secret_key)
    # No node is held to account for what is done to it on purpose: of three, two would be left after minutes.
    install.install_all(target, NAMESPACE, BUCKET, values={"nodes.excludePerHour": 0})
    columns = TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=plan.steps)
        return soak(target, folder, plan, console.print, lambda step: bar.update(task, completed=step))


if __name__ == "__main__":
    sys.exit(main())
