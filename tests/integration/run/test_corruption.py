"""A pod whose hardware spoils gradients: its rank is named, another pod takes its slot, the run goes back to a state
that is verified, and it ends as a run in which nothing was wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from integration.run import small
from integration.run.test_inject import inject
from localrun import LocalRun
from lockstep_cli import journal
from lockstep_cli.store import open_uri
from lockstep_trainer.injection.bitflips import VARIABLE
from lockstep_trainer.replay.sampling import Sampling

pytestmark = [pytest.mark.run, pytest.mark.timeout(700)]

STEPS, EVERY, SHARE, SEED = 16, 3, 0.15, 4
LONG = 60
"""Steps that last while a fault is ordered."""
WRONG, POD = 2, "quickstart-1-0"
BEGINS = 6
"""Steps of two micro-batches that pass before the first wrong gradient; fewer of those that are replayed."""


def overrides(action: str, nodes: int, *, ranks: int = 4, steps: int = STEPS) -> list[str]:
    """On how many nodes the ranks are makes no difference to what they compute."""
    return [
        *small.overrides(steps, every=EVERY),
        f"nodes={nodes}",
        f"gpusPerNode={ranks // nodes}",
        f"trainer.recipe.seed={SEED}",
        "trainer.recipe.schedule.warmup=2",
        "trainer.recipe.microBatchSize=1",
        f"resilience.corruption={{action: '{action}', sample: {SHARE}}}",
    ]


def lines(run: LocalRun, kind: str) -> list[dict[str, Any]]:
    return [line for line in journal.read(open_uri(str(run.run_store))) if line["kind"] == kind]


def losses(folder: Path, ranks: int, *, steps: int = STEPS) -> list[float]:
    """Of a run in which nothing is wrong, and nothing is looked for."""
    with LocalRun(folder, overrides("Off", 1, ranks=ranks, steps=steps)) as run:
        result = run.finish(300)
        assert result.code == 0, result.errors + run.output()
        return run.losses()


@pytest.mark.slow  # in CI the cluster's test of a corrupt rank has the same end
def test_a_pod_that_spoils_gradients_is_replaced_and_leaves_no_trace(tmp_path: Path) -> None:
    replayed = [step for step in range(2, STEPS) if Sampling(SEED, SHARE).includes(step)]
    fault = {
        "rank": WRONG, "on": POD, "site": "gradient", "layer": 1, "bit": 22, "element": 3, "after": 2 * BEGINS,
    }  # fmt: skip
    environment = {VARIABLE: json.dumps([fault])}
    with LocalRun(
        tmp_path / "wrong", overrides("Rollback", 2), environment=environment, program="localrun.apart"
    ) as run:
        result = run.finish(300)
        assert result.code == 0, result.errors + run.output()
        status = result.status
        (cut,) = lines(run, "rollback")
        (verdict,) = [one for one in status.verdicts if one.kind == "Corrupt"]
        assert (verdict.cause, verdict.ranks) == ("Permanent", [WRONG])
        assert verdict.since in replayed
        assert cut["step"] == max([1, *(step for step in replayed if step < verdict.since)])
        faults = [one for one in status.faults if one.cause == "Corruption"]
        assert [(one.rung, one.rank, one.pod, one.blame) for one in faults] == [("pod", WRONG, POD, "Named")]
        assert status.slots["1"] == "quickstart-1-1"
        assert [(one.node, one.reason) for one in status.excluded_nodes] == [(faults[0].node, "Corruption")]
        assert verdict.nodes == [faults[0].node]
        resumed = next(line["step"] for line in lines(run, "restore") if line["epoch"] > cut["epoch"])
        assert resumed <= cut["step"]
        assert run.check(STEPS).exact
        assert run.losses() == losses(tmp_path / "clean", 4)  # bitwise


@pytest.mark.parametrize("wrong", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_of_two_units_a_spare_tells_which_is_wrong(wrong: int, tmp_path: Path) -> None:
    """From some step on a product is always wrong: both units repeat themselves. Slot 1's pod is put aside first."""
    asked = [*overrides("Rollback", 2, ranks=2, steps=LONG), "spares=1"]
    with LocalRun(tmp_path / "wrong", asked, options=["--fault-injection"], program="localrun.apart") as run:
        run.until_step(5)
        first = dict(run.status.slots)
        inject(run, "--rank", str(wrong), "--site", "product", "--layer", "1", "--bit", "22")
        result = run.finish(300)
        assert result.code == 0, result.errors + run.output()
        status = result.status
        *undecided, named = [one for one in status.verdicts if one.kind == "Corrupt"]
        assert {(one.cause, *one.ranks) for one in undecided} == {("Undecided", 0, 1)}
        assert (named.cause, named.ranks) == ("Permanent", [wrong])
        faults = [(one.cause, one.rung, one.pod) for one in status.faults]
        cleared = [("CorruptionSuspected", "spare", first["1"])] if wrong == 0 else []
        assert faults[:-1] == [("CorruptionSuspected", "process", None), *cleared]
        assert (faults[-1][0], faults[-1][2]) == ("Corruption", first[str(wrong)])
        assert [(one.node, one.reason) for one in status.excluded_nodes] == [(status.faults[-1].node, "Corruption")]
        assert named.nodes == [status.faults[-1].node]
        assert first[str(wrong)] not in status.slots.values()
        assert run.check(LONG).exact
        assert run.losses() == losses(tmp_path / "clean", 2, steps=LONG)  # bitwise


@pytest.mark.slow  # in CI unit tests have it
def test_what_differs_whichever_pods_compute_is_put_down_to_no_gpu(tmp_path: Path) -> None:
    """As a library that adds up in another order on one of two ranks: the fault goes with the rank."""
    fault = {"rank": 1, "site": "product", "layer": 1, "bit": 22, "element": 3}
    environment = {VARIABLE: json.dumps([fault])}
    asked = [*overrides("Rollback", 2, ranks=2), "spares=1"]
    with LocalRun(tmp_path, asked, environment=environment, program="localrun.apart") as run:
        result = run.finish(300)
        assert result.code == 0, result.errors + run.output()
        faults = [(one.cause, one.rung) for one in result.status.faults]
        assert [cause for cause, _ in faults] == ["CorruptionSuspected"] * 4
        assert [faults[0][1], faults[3][1]] == ["process", "process"]
        assert {one.cause for one in result.status.verdicts if one.kind == "Corrupt"} == {"Undecided"}
        assert result.status.excluded_nodes == []
