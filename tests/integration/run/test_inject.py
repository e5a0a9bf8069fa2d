"""`lockstep inject` on a run: faults made on purpose are found by what looks for real ones, and are told apart from
them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from awaited import eventually
from integration.run import small
from localrun import LocalRun
from lockstep_api.v1alpha1 import TrainingJobStatus
from lockstep_cli import journal
from lockstep_cli.store import open_uri

pytestmark = [pytest.mark.run, pytest.mark.timeout(400)]

RANK = 2


def inject(run: LocalRun, *arguments: str, code: int | None = 0) -> str:
    """What the command says; ``code`` None: it may be refused or not."""
    command = [sys.executable, "-m", "lockstep_cli", "inject", str(run.state), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert code in (None, done.returncode), done.stderr + done.stdout + run.output()
    return done.stderr if done.returncode else done.stdout


def lines(run: LocalRun, kind: str) -> list[dict[str, Any]]:
    return [line for line in journal.read(open_uri(str(run.run_store))) if line["kind"] == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRun]:
    overrides = [
        *small.overrides(100_000, every=100_000),
        "nodes=2",
        "gpusPerNode=2",
        "resilience.corruption={action: Report, sample: 0.5}",
        "resilience.hang.minimumSeconds=3",
    ]
    with LocalRun(tmp_path_factory.mktemp("inject"), overrides, options=["--fault-injection"]) as run:
        run.until_step(5)
        yield run


def test_a_flipped_bit_is_located_and_said_to_be_made(run: LocalRun) -> None:
    said = inject(run, "--rank", str(RANK), "--site", "gradient", "--layer", "1", "--bit", "22", "--steps", "40")
    assert "rank 2: bit 22 of the query weight's gradient of layer 1 flips each time, for 40 steps" in said
    eventually(lambda: lines(run, "corruption"), "a line of the journal")
    verdict = lines(run, "corruption")[0]["verdicts"][0]
    assert verdict["ranks"] == [RANK]
    assert "blocks.1" in verdict["point"]
    (line,) = lines(run, "injected")
    assert (line["rank"], line["node"]) == (RANK, "local")
    (told,) = run.status.injections
    assert told.what == line["what"]
    why = subprocess.run(
        [sys.executable, "-m", "lockstep_cli", "why", str(run.state)], capture_output=True, text=True, check=True
    )
    assert f"A fault was made on purpose, by `lockstep inject`, on rank {RANK} (node local): bit 22" in why.stdout
    assert run.status.restarts.total == 0


def test_what_can_not_be_done_is_refused_and_training_goes_on(run: LocalRun) -> None:
    inject(run, "--rank", str(RANK), "--clear", code=None)  # its 40 steps may be over
    eventually(lambda: "has no fault" in inject(run, "--rank", str(RANK), "--clear", code=None), "the end of the fault")
    assert "has the layers 0, 1" in inject(run, "--rank", "0", "--site", "product", "--layer", "7", code=1)
    assert "has the ranks 0 to 3" in inject(run, "--rank", "4", "--stall", code=1)
    run.until_step(run.status.progress.step + 5)


@pytest.mark.slow  # the detector wants a hundred steps; test_slow has one in CI
def test_a_slowed_rank_is_named_until_it_is_withdrawn(run: LocalRun) -> None:
    inject(run, "--rank", str(RANK), "--slow", "100")
    assert "has a fault already (its own work takes 100% longer)" in inject(run, "--rank", "2", "--stall", code=1)

    def named(status: TrainingJobStatus) -> bool:
        return any(one.ranks == [RANK] and one.cause == "Compute" for one in status.verdicts)

    run.until(named, 240, "a verdict on the slowed rank")
    inject(run, "--rank", str(RANK), "--clear")
    ended = lambda status: all(one.ended for one in status.verdicts if one.ranks == [RANK])  # noqa: E731
    run.until(ended, 240, "the end of the verdict")
    assert run.status.injections[-1].what == "withdrawn: its own work takes 100% longer"


def test_a_rank_that_stalls_is_named_and_the_job_goes_on(run: LocalRun) -> None:
    inject(run, "--rank", str(RANK), "--stall")
    mended = lambda status: bool(status.faults) and status.faults[-1].steps_lost is not None  # noqa: E731
    fault = run.until(mended, 120, "recovery").faults[-1]
    assert (fault.cause, fault.rank) == ("Hang", RANK)
    assert any("stand_still" in line for line in fault.log_tail)
    run.until_step(run.status.progress.step + 5)
    assert run.status.restarts.total == 1, "it stalls once"


def test_without_leave_nothing_is_done(tmp_path: Path) -> None:
    with LocalRun(tmp_path, small.overrides(100_000, every=100_000)) as run:
        run.until_step(2, 240)
        said = inject(run, "--rank", "0", "--stall", code=1)
        assert "faultInjection.enabled" in said
        assert not list(run.state.glob("pods/*/faults"))
        assert json.loads((run.state / "status.json").read_text())["status"].get("injections", []) == []


def test_spoilt_shards_are_noticed_and_nothing_goes_on_from_them(tmp_path: Path) -> None:
    overrides = [*small.overrides(100_000, every=10), "checkpoint.memory.buddy=false"]
    with LocalRun(tmp_path, overrides, options=["--fault-injection"]) as run:
        run.until(lambda status: status.checkpoint.durable is not None, 300, "a checkpoint")
        said = inject(run, "--rank", "1", "--corrupt-shard", "store")
        (folder,) = [word.split("/")[0] for word in said.split() if "/__1_" in word]
        said = inject(run, "--rank", "1", "--corrupt-shard", "memory")
        assert "in its snapshot of step" in said
        verify = [sys.executable, "-m", "lockstep_cli", "checkpoint", "verify", str(run.state), "--all"]
        done = subprocess.run(verify, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1
        assert folder in done.stdout + done.stderr
        eventually(lambda: len(lines(run, "injected")) == 2, "both lines of the journal")
        run.until_step(run.status.progress.step + 10)
        assert run.status.restarts.total == 0


@pytest.mark.slow  # two runs to their ends; unit/trainer/test_replay_rest has the finding of it
def test_a_moment_that_flips_in_memory_is_left_behind(tmp_path: Path) -> None:
    """Nobody computes otherwise than the others: all gather the same wrong weight."""
    overrides = [
        *small.overrides(300),
        "nodes=2",
        "gpusPerNode=2",
        "spares=1",
        "resilience.corruption={action: Rollback, sample: 1.0}",
    ]
    losses = []
    for name in ("clean", "struck"):
        with LocalRun(tmp_path / name, overrides, options=["--fault-injection"], program="localrun.apart") as run:
            if name == "struck":
                run.until_step(60)
                order = ("--site", "optimizer", "--layer", "1", "--bit", "20", "--steps", "1")
                inject(run, "--rank", str(RANK), *order)
            result = run.finish(300)
            assert result.code == 0, result.errors
            assert run.check(300).exact
            losses.append(run.losses())
    (fault,) = result.status.faults
    assert (fault.cause, fault.witness, fault.rank, fault.rung) == ("Corruption", "arbiter", RANK, "spare")
    assert "blocks.1.attention.query.weight, exp_avg had other bits" in fault.message
    assert losses[0] == losses[1]
