"""How long from asking for a job to its first step, in parts: for `lockstep run` and for a cluster.

    python tests/bench/startup.py local [--repeats 10]
    python tests/bench/startup.py cluster [--repeats 10]

Each repeat starts the quick-start's job from nothing: new pods, new processes, no prepared data. Images are loaded.
Times come from the run's own journal and from the pods' status. Prints the median and the spread of each part, and
writes all values to docs/results/startup-<where>.json.

    command      from the start of the command to the operator's first decision (local only)
    schedule     from apply to both pods being given a node (cluster only; the API tells whole seconds)
    container    from there to both containers running (cluster only; the same)
    agent        from there to the first membership
    form         from the membership to the order to start: streams, restore point, and the rendezvous store, which
                 the leader's zygote forks once torch is imported
    zygote       from the order to the workers: what of the imports is not done by then in the other pods
    data         tokenizer and tokens
    rendezvous   process group
    build        model and optimizer
    restore      weights
    first step
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from bench import results  # noqa: E402 - the path comes first
from lockstep_cli import journal, manifest, times  # noqa: E402
from lockstep_cli.report.sections import START_SECTIONS  # noqa: E402

QUICKSTART = REPOSITORY / "examples/quickstart.yaml"
SETTINGS = ["trainer.recipe.steps=2", "trainer.evaluate=null", "trainer.generate=null"]

Parts = dict[str, float]


@dataclass(frozen=True, slots=True)
class Before:
    """What happened before the journal's first line: (part, Unix seconds at its end), in order."""

    asked: float
    marks: tuple[tuple[str, float], ...]


def parts(told: journal.Journal, before: Before) -> Parts:
    """Seconds per part, and their sum as ``all``."""
    first = told.steps[0]
    once = {name: first.sections.get(name, 0.0) for name in START_SECTIONS}
    marks = [
        *before.marks,
        ("agent", told.memberships[0].at),
        ("form", told.starts[0].at),
        ("zygote", first.at - first.seconds - sum(once.values())),
    ]
    found, last = {}, before.asked
    for name, at in marks:
        found[name] = at - last
        last = at
    return {**found, **once, "first step": first.seconds, "all": first.at - before.asked}


def local() -> Parts:
    """One `lockstep run`."""
    from localrun import LocalRun

    with tempfile.TemporaryDirectory() as folder, LocalRun(Path(folder), SETTINGS) as run:
        result = run.finish()
        if result.code:
            raise SystemExit(f"lockstep run failed: {result.errors}")
        begun = times.parse(str(result.status.start_time))
        return parts(run.journal(), Before(run.started, (("command", begun),)))


def in_cluster(target: Any, number: int) -> Parts:
    """One job in the cluster."""
    from demonstration import install
    from e2e.jobs import BUCKET, RunningJob
    from lockstep_cli import store

    document = manifest.override(manifest.read(str(QUICKSTART)), SETTINGS)
    spec = document["spec"]
    s3 = {"endpoint": target.s3.endpoint_pods, "pathStyle": True, "secretRef": {"name": install.SECRET}}
    spec["checkpoint"] = {"uri": f"s3://{BUCKET}/bench", "every": 100, "s3": s3}
    resources = {"limits": {"nvidia.com/gpu": spec["gpusPerNode"], "memory": "4Gi"}, "requests": {"cpu": "100m"}}
    container = {"name": "trainer", "resources": resources}
    spec["template"] = {"spec": {"terminationGracePeriodSeconds": 2, "containers": [container]}}
    running = RunningJob(target, f"startup-{number}", spec)
    asked = time.time()
    with running:
        job = running.until(lambda j: j.status.progress.step >= 1, 180, "the first step")
        pods = [pod["status"] for pod in running.pods()]
        running.until_phase("Succeeded", 60)
        assert job.spec.checkpoint is not None
        here = job.spec.checkpoint.s3.model_copy(update={"endpoint": target.s3.endpoint_host})
        told = journal.fold(journal.read(store.open_uri(store.run_uri(job), here)))
    scheduled = max(_condition(status, "PodScheduled") for status in pods)
    started = max(times.parse(status["containerStatuses"][0]["state"]["running"]["startedAt"]) for status in pods)
    return parts(told, Before(asked, (("schedule", scheduled), ("container", started))))


def _condition(status: dict[str, Any], kind: str) -> float:
    return next(times.parse(c["lastTransitionTime"]) for c in status["conditions"] if c["type"] == kind)


def repeat_in_cluster(repeats: int, say: Console) -> list[Parts]:
    """Brings up the cluster, once, and takes it down if it was not up before."""
    from demonstration import install
    from demonstration.target import Target
    from e2e.jobs import BUCKET, NAMESPACE
    from localcluster import Cluster

    was_up = Cluster().healthy()
    target = Target.local(Cluster.up(nodes=3, gpus=2))
    try:
        os.environ.update(AWS_ACCESS_KEY_ID=target.s3.access_key, AWS_SECRET_ACCESS_KEY=target.s3.secret_key)
        install.install_all(target, NAMESPACE, BUCKET, operators=1)
        return [_told(in_cluster(target, number), say) for number in range(repeats)]
    finally:
        if not was_up and target.cluster is not None:
            target.cluster.down()


def _told(one: Parts, say: Console) -> Parts:
    say.print(f"  {one['all']:.1f} s to the first step")
    return one


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=("local", "cluster"))
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    console = Console(highlight=False)
    load = os.getloadavg()[0]
    if arguments.where == "local":
        found = [_told(local(), console) for _ in range(arguments.repeats)]
    else:
        found = repeat_in_cluster(arguments.repeats, console)
    console.print(table(found, arguments.where))
    results.RESULTS.mkdir(parents=True, exist_ok=True)
    result = {
        **results.origin(
            f"seconds from asking to the first step, {arguments.where}", f"Python {platform.python_version()}"
        ),
        "load_before": round(load, 2),
        "median": {name: round(statistics.median(one[name] for one in found), 3) for name in found[0]},
        "repeats": [{name: round(value, 3) for name, value in one.items()} for one in found],
    }
    path = results.RESULTS / f"startup-{arguments.where}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {path.relative_to(REPOSITORY)}")


def table(found: list[Parts], where: str) -> Table:
    """Median and spread of each part."""
    shown = Table("part", "median s", "min", "max", title=f"asking to first step, {where}, {len(found)} repeats")
    for name in found[0]:
        values = sorted(one[name] for one in found)
        shown.add_row(name, f"{statistics.median(values):.2f}", f"{values[0]:.2f}", f"{values[-1]:.2f}")
    return shown


if __name__ == "__main__":
    main()
