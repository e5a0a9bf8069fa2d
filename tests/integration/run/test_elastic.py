"""A job that loses a pod and finds no room for another: it goes on with fewer, and grows when there is room again.

What is protected: the samples are exactly those of a run that never changed its width, whichever pod was lost; losses
agree within rounding; growing loses no step; status, report and ledger tell what happened.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from integration.run import braking, small
from localrun import LocalRun
from localrun.run import QUICKSTART
from lockstep_api.v1alpha1 import Phase, TrainingJobStatus

pytestmark = [pytest.mark.run, pytest.mark.timeout(600)]

STEPS = 400
SCRIPT = Path(__file__).with_name("elastic_script.py")
SAME_LOSS = 1e-5
"""Relative: what sums in another order may differ by, as between other layouts."""


def overrides() -> list[str]:
    """Three pods of one worker that share six samples: two can, too."""
    return [
        *small.overrides(STEPS),
        "nodes=3",
        "trainer.recipe.globalBatchTokens=192",
        "resilience.elastic={minNodes: 2, shrinkAfterSeconds: 1}",
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run that trains on three pods from its first step to its last."""
    with LocalRun(tmp_path_factory.mktemp("undisturbed"), overrides()) as run:
        result = run.finish(500)
        assert result.code == 0, result.errors + run.output()
        return run.losses()


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRun]:
    """One run that shrinks and grows."""
    folder = tmp_path_factory.mktemp("elastic")
    manifest = Path(shutil.copy(QUICKSTART, folder))
    shutil.copy(Path(braking.__file__), folder)
    with LocalRun(folder, [*overrides(), "trainer.recipe.loss=braking:loss"], manifest=manifest) as run:
        run.until_step(12, 240)
        yield run


def room_for(run: LocalRun, pods: int) -> None:
    (run.state / "capacity").write_text(str(pods))


def trains_on(run: LocalRun, nodes: int, seconds: float = 180) -> TrainingJobStatus:
    """Waits until so many nodes train, and have made steps."""
    status = run.until(
        lambda s: s.elastic.nodes == nodes and s.phase == Phase.RUNNING and len(s.slots) == nodes,
        seconds, f"training on {nodes} nodes",
    )  # fmt: skip
    return run.until_step(status.progress.step + 12, seconds)


@pytest.mark.parametrize("slot", [pytest.param(2, id="member"), pytest.param(0, id="leader", marks=pytest.mark.slow)])
def test_a_job_without_room_shrinks_and_grows_again(slot: int, journey: LocalRun) -> None:
    before = journey.status
    room_for(journey, 2)
    supervisor = journey.supervisor(slot)
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)

    shrunk = trains_on(journey, 2)
    assert sorted(shrunk.slots) == ["0", "1"]
    assert shrunk.restarts.shrink == before.restarts.shrink + 1
    assert shrunk.faults[-1].rung == "shrink"
    condition = next(each for each in shrunk.conditions if each.type == "Shrunk")
    assert condition.status == "True"
    assert "Training on 2 of 3 nodes" in condition.message
    assert "this machine has room for 2 pods" in condition.message

    brake = journey.state.parent / braking.BRAKE
    brake.touch()  # it trains until the newcomer's imports are loaded
    room_for(journey, 3)
    journey.until(lambda s: s.elastic.nodes == 3, 180, "an epoch of three nodes")
    brake.unlink()
    grown = trains_on(journey, 3)
    assert sorted(grown.slots) == ["0", "1", "2"]
    assert next(each for each in grown.conditions if each.type == "Shrunk").status == "False"


@pytest.mark.slow
def test_a_job_for_which_there_is_no_room_lets_its_pods_go_and_begins_again_from_the_store(tmp_path: Path) -> None:
    changes = [*small.overrides(60), "resilience.requeueAfterSeconds=3"]
    with LocalRun(tmp_path, changes) as run:
        before = run.until_step(22, 240)
        room_for(run, 1)
        supervisor = run.supervisor(1)
        assert supervisor is not None
        os.kill(supervisor, signal.SIGKILL)
        waiting = run.until(lambda s: s.restarts.requeue == 1, 180, "letting all pods go")
        assert waiting.phase == Phase.PENDING
        assert waiting.slots == {}
        run.until(lambda _: not run.supervisors(), 60, "the end of all pods")
        assert (waiting.checkpoint.durable.step if waiting.checkpoint.durable else 0) >= 20
        room_for(run, 2)
        again = run.until(lambda s: s.phase == Phase.RUNNING, 240, "the next start")
        assert again.epoch > before.epoch
        result = run.finish(200)
        assert result.code == 0, result.errors
        verdict = run.check(60)
        assert verdict.exact, verdict
        assert (run.journal().starts[-1].restored_step or 0) >= 20


def test_a_script_runs_with_another_world_size(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    spec = {
        "nodes": 2,
        "gpusPerNode": 1,
        "command": ["python", str(SCRIPT), str(tmp_path)],
        "resilience": {"elastic": {"minNodes": 1, "shrinkAfterSeconds": 1}},
    }
    job = {
        "apiVersion": "lockstep.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": "script"},
        "spec": spec,
    }
    file.write_text(yaml.safe_dump(job))

    def worlds() -> list[str]:
        path = tmp_path / "worlds"
        return path.read_text().split() if path.exists() else []

    with LocalRun(tmp_path / "run", ["spares=0"], manifest=file) as run:
        run.until(lambda _: sorted(worlds()) == ["0/2", "1/2"], 120, "two processes")
        room_for(run, 1)
        supervisor = run.supervisor(1)
        assert supervisor is not None
        os.kill(supervisor, signal.SIGKILL)
        run.until(lambda _: worlds()[2:] == ["0/1"], 120, "one process")
        room_for(run, 2)
        run.until(lambda _: sorted(worlds()[3:]) == ["0/2", "1/2"], 120, "two processes again")
        (tmp_path / "finish").touch()
        result = run.finish(100)
        assert result.code == 0, result.errors + run.output()


def test_the_run_ends_as_if_it_had_never_been_smaller(journey: LocalRun, undisturbed: list[float]) -> None:
    result = journey.finish(400)
    assert result.code == 0, result.errors
    verdict = journey.check(STEPS)
    assert verdict.exact, verdict
    assert journey.losses() == pytest.approx(undisturbed, rel=SAME_LOSS)
    ledger, held = result.status.ledger, result.status.ledger_state
    assert sum(ledger.values()) == pytest.approx(sum(held.base.values()) + held.member_seconds, abs=0.1)
    assert ledger["productive"] > 0
