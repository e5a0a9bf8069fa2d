"""A rank whose device or link is slow is named while its job trains, in the status and in the journal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from awaited import eventually
from integration.run import small
from localrun import LocalRun
from localrun.run import QUICKSTART
from lockstep_api.v1alpha1 import TrainingJobStatus
from lockstep_cli import journal
from lockstep_cli.store import open_uri

SLOW_DEVICE, SLOW_LINK = (Path(__file__).resolve().parents[2] / name for name in ("slowdevice.py", "slowlink.py"))
pytestmark = [pytest.mark.run, pytest.mark.timeout(600)]

SLOW = 2


def named(status: TrainingJobStatus, cause: str = "Compute") -> bool:
    return any(verdict.ranks == [SLOW] and verdict.cause == cause for verdict in status.verdicts)


def test_a_rank_with_a_slow_device_is_named_while_the_job_trains(tmp_path: Path) -> None:
    manifest = tmp_path / "job.yaml"
    shutil.copyfile(QUICKSTART, manifest)
    shutil.copy(SLOW_DEVICE, tmp_path)
    overrides = [
        *small.overrides(100_000, every=100_000),  # until it is named
        "nodes=2",
        "gpusPerNode=2",
        "trainer.recipe.loss=slowdevice:loss",
    ]
    with LocalRun(tmp_path, overrides, manifest=manifest) as run:
        pod = run.until_step(20).slots["1"]
        (run.state / "pods" / pod / "slow").write_text(f"{SLOW} 0.0002")
        status = run.until(named, 240, "a verdict on the slow rank")
        verdict = next(one for one in status.verdicts if one.ranks == [SLOW])
        assert (verdict.kind, len(verdict.nodes)) == ("Slow", 1)
        assert verdict.slowdown > 0.1
        assert verdict.ended is None

        def lines() -> list[list[int]]:
            return [line["ranks"] for line in journal.read(open_uri(str(run.run_store))) if line["kind"] == "straggler"]

        eventually(lambda: [SLOW] in lines(), "a line of the journal")  # it is written some time after the status


@pytest.mark.slow  # three turns of pairs, and the detector's second look, take minutes here
def test_a_rank_with_a_slow_link_is_named_while_the_job_trains(tmp_path: Path) -> None:
    """No single pair of a loopback interface can be slowed down: what the rank calls to transfer data is late."""
    manifest = tmp_path / "job.yaml"
    shutil.copyfile(QUICKSTART, manifest)
    shutil.copy(SLOW_LINK, tmp_path)
    overrides = [
        *small.overrides(100_000, every=100_000),
        "nodes=4",
        "trainer.recipe.loss=slowlink:loss",
    ]
    with LocalRun(tmp_path, overrides, manifest=manifest) as run:
        status = run.until(lambda now: named(now, "Network"), 500, "a verdict on the slow link")
        verdict = next(one for one in status.verdicts if one.ranks == [SLOW])
        assert (verdict.kind, len(verdict.nodes)) == ("Slow", 1)
