"""A job that loses a pod and finds no room for another: it goes on with fewer, and grows when there is room again.

What is protected: the samples are exactly those of a run that never changed its width, whichever pod was lost; losses
agree within rounding; growing loses no step; status, report and ledger tell what happened.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from integration.run import small
from localrun import LocalRun
from lockstep_api.v1alpha1 import Phase, TrainingJobStatus

pytestmark = [pytest.mark.run, pytest.mark.timeout(600)]

STEPS = 400
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
    with LocalRun(tmp_path_factory.mktemp("elastic"), overrides()) as run:
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


@pytest.mark.parametrize("slot", [2, 0], ids=["member", "leader"])
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

    room_for(journey, 3)
    grown = trains_on(journey, 3)
    assert sorted(grown.slots) == ["0", "1", "2"]
    assert next(each for each in grown.conditions if each.type == "Shrunk").status == "False"


def test_the_run_ends_as_if_it_had_never_been_smaller(journey: LocalRun, undisturbed: list[float]) -> None:
    result = journey.finish(400)
    assert result.code == 0, result.errors
    verdict = journey.check(STEPS)
    assert verdict.exact, verdict
    assert journey.losses() == pytest.approx(undisturbed, rel=SAME_LOSS)
    ledger, held = result.status.ledger, result.status.ledger_state
    assert sum(ledger.values()) == pytest.approx(sum(held.base.values()) + held.member_seconds, abs=0.1)
    assert ledger["productive"] > 0
