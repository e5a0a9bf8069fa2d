"""A rank on a slow node: its slot moves to the spare on another node, and no step is lost or done twice."""

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

SLOW_DEVICE = Path(__file__).resolve().parents[2] / "slowdevice.py"
# In CI the cluster's test of a slow rank has the same end.
pytestmark = [pytest.mark.run, pytest.mark.slow, pytest.mark.timeout(1800)]

SLOT = 1
PATIENCE = 600.0
"""Seconds: four pods start at once, on whatever is left of this machine's cores."""
MORE = 0.0001
"""Seconds by which each matrix product of the slow rank takes longer: about half of its work, and more."""
SETTINGS = [
    *small.overrides(100_000, every=100_000),  # until it is left
    "trainer.recipe.globalBatchTokens=384",
    "trainer.recipe.loss=slowdevice:loss",
]


def left(status: TrainingJobStatus) -> bool:
    """It goes on elsewhere, and what that has cost is known."""
    return any(fault.cause == "Straggler" and fault.steps_lost is not None for fault in status.faults)


def steps(run: LocalRun, last: int) -> dict[int, list[float]]:
    """Step → the losses that its computations gave, from the journal, which has them some time after the status."""

    def told() -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for line in journal.read(open_uri(str(run.run_store))):
            if line["kind"] == "step" and line["step"] <= last:
                found.setdefault(line["step"], []).append(line["loss"])
        return found

    eventually(lambda: len(told()) == last, f"all of {last} steps in the journal")
    return told()


def test_a_slow_node_is_left_for_a_spare_and_no_step_is_lost_or_done_twice(tmp_path: Path) -> None:
    manifest = tmp_path / "job.yaml"
    shutil.copyfile(QUICKSTART, manifest)
    shutil.copy(SLOW_DEVICE, tmp_path)
    swap = [*SETTINGS, "nodes=3", "spares=1", "resilience={stragglers: {action: Swap}}"]
    with LocalRun(tmp_path / "moved", swap, manifest=manifest, program="localrun.apart") as run:
        pod = run.until_step(20, PATIENCE).slots[str(SLOT)]
        (run.state / "pods" / pod / "slow").write_text(f"{SLOT} {MORE}")
        status = run.until(left, PATIENCE, "the move of the slow rank's slot")
        fault = next(one for one in status.faults if one.cause == "Straggler")
        assert (fault.pod, fault.rung, fault.witness, fault.steps_lost) == (pod, "spare", "ownWork", 0), fault
        assert status.slots[str(SLOT)] != pod
        assert [one.node for one in status.excluded_nodes] == [fault.node]
        assert status.budgets_used.pod == 0

        last = status.progress.step + 30
        after = run.until_step(last, PATIENCE)
        assert [one for one in after.verdicts if one.ranks == [SLOT] and one.ended is None] == []
        moved = steps(run, last)
    assert {step: len(losses) for step, losses in moved.items() if len(losses) > 1} == {}

    # The same ranks in one pod: one start instead of three, and losses don't depend on it.
    together = [*SETTINGS, "nodes=1", "gpusPerNode=3"]
    with LocalRun(tmp_path / "calm", together, manifest=manifest) as run:
        run.until_step(last, PATIENCE)
        assert steps(run, last) == moved
