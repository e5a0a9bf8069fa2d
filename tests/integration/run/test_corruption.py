"""A pod whose hardware spoils gradients: its rank is named, another pod takes its slot, the run goes back to a state
that is verified, and it ends as a run in which nothing was wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from integration.run import small
from localrun import LocalRun
from lockstep_cli import journal
from lockstep_cli.store import open_uri
from lockstep_trainer.injection.bitflips import VARIABLE
from lockstep_trainer.replay.sampling import Sampling

# In CI the cluster's test of a corrupt rank has the same end.
pytestmark = [pytest.mark.run, pytest.mark.slow, pytest.mark.timeout(700)]

STEPS, EVERY, SHARE, SEED = 16, 3, 0.15, 4
WRONG, POD = 2, "quickstart-1-0"
BEGINS = 6
"""Steps of two micro-batches that pass before the first wrong gradient; fewer of those that are replayed."""


def overrides(action: str, nodes: int) -> list[str]:
    """Four ranks; on how many nodes they are makes no difference to what they compute."""
    return [
        *small.overrides(STEPS, every=EVERY),
        f"nodes={nodes}",
        f"gpusPerNode={4 // nodes}",
        f"trainer.recipe.seed={SEED}",
        "trainer.recipe.schedule.warmup=2",
        "trainer.recipe.microBatchSize=1",
        f"resilience.corruption={{action: '{action}', sample: {SHARE}}}",
    ]


def lines(run: LocalRun, kind: str) -> list[dict[str, Any]]:
    return [line for line in journal.read(open_uri(str(run.run_store))) if line["kind"] == kind]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run in which nothing is wrong, and nothing is looked for."""
    with LocalRun(tmp_path_factory.mktemp("clean"), overrides("Off", 1)) as run:
        result = run.finish(300)
        assert result.code == 0, result.errors + run.output()
        return run.losses()


def test_a_pod_that_spoils_gradients_is_replaced_and_leaves_no_trace(tmp_path: Path, clean: list[float]) -> None:
    replayed = [step for step in range(2, STEPS) if Sampling(SEED, SHARE).includes(step)]
    fault = {
        "rank": WRONG, "on": POD, "site": "gradient", "layer": 1, "bit": 22, "element": 3, "after": 2 * BEGINS,
    }  # fmt: skip
    environment = {VARIABLE: json.dumps([fault])}
    with LocalRun(tmp_path, overrides("Rollback", 2), environment=environment, program="localrun.apart") as run:
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
        assert run.losses() == clean  # bitwise
