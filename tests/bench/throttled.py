"""How soon a rank that its cgroup's CPU quota slows is named, in real runs; and what is named where nobody is slow.

    python tests/bench/throttled.py [--shares 0,0.1,0.2,0.3,0.5] [--steps 400] [--write]     # as root

Each share is a run of four ranks on this machine, each in a cgroup of its own. Behind step 60 rank 2 gets a quota of
the CPU time that it has used until then, divided by 1 + share: its steps, waiting included, take at least that much
longer, its own work more. Printed are the steps until a verdict names that rank and no other, its cause and its level,
and all verdicts that blame another rank's hardware. Share 0 is a run without a quota, of as many steps. With --write
the result goes into docs/results/throttled.json, behind those of runs before.

What else uses this machine's cores meanwhile is in the figures. With --idle the ranks only get what others leave.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / name) for name in ("tests", "trainer", "crds", "operator")]

from bench import results  # noqa: E402 - the path comes first
from integration.run import small  # noqa: E402
from localcluster.cgroups import ROOT, is_v2  # noqa: E402
from localrun import LocalRun, victims  # noqa: E402
from lockstep_api.v1alpha1 import TrainingJobStatus, Verdict  # noqa: E402
from lockstep_operator.plan.swap import HARDWARE  # noqa: E402

RANK = 2
WARM_STEPS = 60
"""Steps before the quota: the detector knows the job by then."""
LOOK_SECONDS = 10.0
"""Over which the rank's use of the CPU is measured."""
PERIOD = 10_000
"""Microseconds in which a quota is used up and filled again: short beside a step."""
PATIENCE = 1800.0


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one run."""

    share: float
    steps: int  # that were watched
    delay: int | None  # steps from the quota to the verdict; None: there was none
    cause: str
    slowdown: float
    others: tuple[str, ...]  # verdicts that blame another rank's hardware


def watch(folder: Path, share: float, steps: int, *, idle: bool) -> Found:
    """One run."""
    overrides = [*small.overrides(100_000, every=100_000), "nodes=2", "gpusPerNode=2"]
    with LocalRun(folder, overrides) as run, own_cgroups(folder.name, idle=idle) as groups:
        run.until_step(WARM_STEPS, PATIENCE)
        pids = {worker.rank: worker.pid for worker in victims.workers(run.state)}
        for rank, pid in pids.items():
            (groups[rank] / "cgroup.procs").write_text(str(pid))
        if share:
            begun = cpu_seconds(pids[RANK])
            time.sleep(LOOK_SECONDS)
            used = (cpu_seconds(pids[RANK]) - begun) / LOOK_SECONDS
            limit(groups[RANK], used / (1 + share))
        first = run.status.progress.step
        told = run.until(
            lambda status: bool(share and ours(status)) or status.progress.step >= first + steps,
            PATIENCE, "a verdict, or the steps",
        )  # fmt: skip
    last = told.progress.step
    verdict = ours(told)
    others = tuple(
        f"{one.cause} {one.ranks} since {one.since}" for one in told.verdicts if blames(one) and one != verdict
    )
    if verdict is None or not share:
        return Found(share, last - first, None, "", 0.0, others)
    return Found(share, last - first, last - first, verdict.cause, verdict.slowdown, others)


def blames(verdict: Verdict) -> bool:
    """Whether hardware is named."""
    return verdict.kind == "Slow" and verdict.cause in HARDWARE


def ours(status: TrainingJobStatus) -> Verdict | None:
    """The verdict on the rank, if there is one."""
    return next((one for one in status.verdicts if blames(one) and one.ranks == [RANK]), None)


@contextmanager
def own_cgroups(name: str, *, idle: bool) -> Iterator[dict[int, Path]]:
    """A cgroup for each rank, all of the same weight."""
    above = (ROOT if is_v2() else ROOT / "cpu") / f"lockstep-throttled-{os.getpid()}-{name}"
    above.mkdir()
    if idle:
        (above / "cpu.idle").write_text("1")
    if is_v2():
        (above / "cgroup.subtree_control").write_text("+cpu")
    groups = {rank: above / f"rank{rank}" for rank in range(4)}
    for group in groups.values():
        group.mkdir()
    try:
        yield groups
    finally:
        for group in (*groups.values(), above):
            for pid in (group / "cgroup.procs").read_text().split():
                (group.parents[1 if group != above else 0] / "cgroup.procs").write_text(pid)
            group.rmdir()


def limit(group: Path, cores: float) -> None:
    """At most so many cores."""
    quota = max(1000, round(cores * PERIOD))
    if is_v2():
        (group / "cpu.max").write_text(f"{quota} {PERIOD}")
        return
    (group / "cpu.cfs_period_us").write_text(str(PERIOD))
    (group / "cpu.cfs_quota_us").write_text(str(quota))


def cpu_seconds(pid: int) -> float:
    """CPU time of the process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", default="0,0.1,0.2,0.3,0.5", help="by how much the rank is slowed")
    parser.add_argument("--steps", type=int, default=400, help="that a verdict may take; default 400")
    parser.add_argument("--idle", action="store_true", help="give way to whatever else runs on this machine")
    parser.add_argument("--write", action="store_true", help="add to docs/results/throttled.json")
    arguments = parser.parse_args()
    if os.geteuid():
        parser.error("a cgroup of one's own takes root")
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, share in enumerate(map(float, arguments.shares.split(","))):
            one = watch(Path(folder, str(number)), share, arguments.steps, idle=arguments.idle)
            print(one, f"load {os.getloadavg()[0]:.0f}", flush=True)
            found.append(one)
    if arguments.write:
        head = results.origin("a rank slowed by its cgroup's CPU quota, in real runs of four ranks", "gloo")
        load = round(os.getloadavg()[2], 1)
        results.add({**head, "load": load, "runs": [asdict(one) for one in found]}, results.RESULTS / "throttled.json")


if __name__ == "__main__":
    main()
