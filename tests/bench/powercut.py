"""From a power cut to the first new step, on the local cluster: a spare takes the slot.

    python tests/bench/powercut.py [--faults 10] [--write]

8 ranks: two pods of four workers, on a node each, and a spare on a third. The cut is silent: the node's link goes
first, so that no kernel closes a connection. It comes at a random instant, to a random slot, leader's or member's, once
the one before is mended and a spare stands by again. The model is tiny, so that what is measured is the recovery. Cuts
that took the operator at work along, on three nodes about every third, are told apart.

Seconds are from the cut to the end of the first step that is new. The parts are those of status.faults; "operator" is
from the leader's line on the fault to its line on the next membership, and holds all that the API server takes part in:
notice, decide, write, send. A leader that is cut writes no such line: then it is what the operator took to decide. The
result is added to docs/results/powercut.json.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from awaited import eventually  # noqa: E402
from bench import results  # noqa: E402 - the path comes first
from demonstration import faults, install  # noqa: E402
from demonstration.target import Target  # noqa: E402
from e2e.jobs import BUCKET, NAMESPACE, POD_SPEC, RunningJob  # noqa: E402
from e2e.matrix.leg import operators_are_ready  # noqa: E402
from localcluster import Cluster  # noqa: E402

GPUS = 4
PARTS = ("detect", "operator", "decide", "restart", "restore", "first_step", "recompute")
PATIENCE = 300.0


@dataclass(frozen=True, slots=True)
class Cut:
    """One power cut."""

    slot: int
    seconds: float
    steps: int
    rung: str
    restored_from: str
    parts: dict[str, float]
    operator: bool
    """The operator that worked was on this node: another takes over when the Lease has run out."""


def template() -> dict[str, Any]:
    """Four GPUs' worth of workers in a pod."""
    (container,) = POD_SPEC["containers"]
    resources = {"limits": {"nvidia.com/gpu": GPUS, "memory": "6Gi"}, "requests": {"cpu": "100m", "memory": "1Gi"}}
    return {"spec": {**POD_SPEC, "containers": [{**container, "resources": resources}]}}


def ready(job: RunningJob) -> int:
    """Waits until it trains, and a spare and a second operator stand by; its step."""
    eventually(lambda: operators_are_ready(job.target), "both operators", PATIENCE)
    now = job.until(
        lambda j: j.status.phase == "Running" and j.status.members.spares >= 1, PATIENCE, "a spare that stands by"
    )
    return now.status.progress.step


def cut(job: RunningJob, chance: random.Random) -> Cut:
    """Cut one node's power, wait until the job is mended, and switch the node on again."""
    cluster = job.target.cluster
    assert cluster is not None
    before = job.until_step(ready(job) + chance.randint(5, 15), PATIENCE)
    time.sleep(chance.random())  # anywhere in a step
    slot = chance.randrange(2)
    node = job.pods()[slot]["spec"]["nodeName"]
    with_operator = node == install.operator_node(job.target)
    at = time.time()
    faults.cut_node(job.target, node)
    reached = job.job.status.progress.step  # a leader that is cut takes its last lines along
    try:
        after = job.until(
            lambda j: j.status.restarts.total > before.status.restarts.total
            and j.status.faults[-1].steps_lost is not None,
            PATIENCE, "recovery",
        )  # fmt: skip
    finally:
        cluster.power_on(int(node.removeprefix("node")))
    fault = after.status.faults[-1]
    joined, first = told(job, at, reached)
    noticed = next((line["at"] for line in job.journal("fault") if line["at"] > at), None)
    operator = fault.seconds["decide"] if noticed is None else joined - noticed
    parts = {**fault.seconds, "operator": round(operator, 3)}
    return Cut(slot, round(first - at, 3), fault.steps_lost or 0, fault.rung, fault.restored_from, parts, with_operator)


def told(job: RunningJob, at: float, reached: int) -> tuple[float, float]:
    """When the next membership was written, and the first step beyond ``reached`` and all others done: as the journal
    has it, which gets to the store some seconds later."""
    found: list[tuple[float, float]] = []

    def complete() -> bool:
        joined = next((line["at"] for line in job.journal("membership") if line["at"] > at), None)
        if joined is None:
            return False
        steps = job.journal("step")
        highest = max(reached, *(line["step"] for line in steps if line["at"] < joined))
        found.extend((joined, line["at"]) for line in steps if line["step"] > highest)
        return bool(found)

    eventually(complete, "the journal's lines", PATIENCE)
    return min(found)


def measure(target: Target, cuts: int, say: Console) -> list[Cut]:
    """One job, and one cut after another."""
    chance, found = random.Random(1), list[Cut]()
    settings: dict[str, Any] = {"gpusPerNode": GPUS, "spares": 1, "template": template()}
    with RunningJob.training(
        target, "powercut", 1_000_000, every=100, checkpoint={"memory": {"every": 5}}, **settings
    ) as job:
        job.until_step(10, PATIENCE)
        for number in range(cuts):
            found.append(cut(job, chance))
            say.print(f"{number + 1}: {found[-1]}")
    return found


def quantile(values: list[float], share: float) -> float:
    """Of values in any order."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: list[float]) -> dict[str, float]:
    """Median, 90th percentile, worst."""
    return {"p50": quantile(values, 0.5), "p90": quantile(values, 0.9), "worst": max(values)}


def timed(cuts: list[Cut]) -> dict[str, dict[str, float]]:
    """In all and by part."""
    values = {"all": [each.seconds for each in cuts]}
    values |= {part: [each.parts.get(part, 0.0) for each in cuts] for part in PARTS}
    return {name: spread(numbers) for name, numbers in values.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="add the result to docs/results/powercut.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down
    console = Console(width=140, stderr=True, highlight=False)
    load = os.getloadavg()[1]
    target = Target.local(Cluster.up(nodes=3, gpus=GPUS))
    try:
        os.environ.update(AWS_ACCESS_KEY_ID=target.s3.access_key, AWS_SECRET_ACCESS_KEY=target.s3.secret_key)
        install.install_all(target, NAMESPACE, BUCKET)
        found = measure(target, arguments.faults, console)
    finally:
        assert target.cluster is not None
        target.cluster.down()
    kinds = {
        "a node": [each for each in found if not each.operator],
        "with the operator": [e for e in found if e.operator],
    }
    seconds = {kind: timed(cuts) for kind, cuts in kinds.items() if cuts}
    table = Table("seconds", "what is cut", "p50", "p90", "worst", title=f"{len(found)} power cuts, 8 ranks, a spare")
    for kind, parts in seconds.items():
        for name, numbers in parts.items():
            table.add_row(name, f"{kind} ({len(kinds[kind])})", *(f"{value:.2f}" for value in numbers.values()))
    console.print(table)
    result = {
        **results.origin("seconds from a power cut to the first new step; 8 ranks, a spare", "local cluster"),
        "load": [round(load, 1), round(os.getloadavg()[1], 1)],
        "faults": len(found),
        "cuts": {kind: len(cuts) for kind, cuts in kinds.items()},
        "seconds": seconds,
        "steps": {"median": quantile([each.steps for each in found], 0.5), "worst": max(each.steps for each in found)},
        "rungs": {rung: sum(each.rung == rung for each in found) for rung in sorted({each.rung for each in found})},
        "from": {
            one: sum(each.restored_from == one for each in found) for one in {each.restored_from for each in found}
        },
    }
    if arguments.write:
        results.add(result, results.RESULTS / "powercut.json")


if __name__ == "__main__":
    main()
