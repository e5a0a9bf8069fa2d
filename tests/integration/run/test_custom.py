"""A job whose model, loss, data set, optimizer and callback are the user's own, found beside its manifest."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from localrun import LocalRun, victims

pytestmark = [pytest.mark.run, pytest.mark.timeout(240)]

MANIFEST = Path(__file__).resolve().parents[3] / "examples/custom/job.yaml"


def overrides(folder: Path, steps: int) -> list[str]:
    return [
        f"trainer.recipe.steps={steps}",
        "trainer.evaluate.every=1000",
        "trainer.recipe.schedule.warmup=5",
        f"trainer.callbacks.1.options.file={folder / 'diary.jsonl'}",
        "checkpoint.every=10",
    ]


def test_everything_of_ones_own_trains_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    with LocalRun(tmp_path, overrides(tmp_path, 60), manifest=MANIFEST) as run:
        run.until_step(15)
        os.kill(next(victims.workers(run.state)).pid, signal.SIGKILL)
        result = run.finish(200)
        assert result.code == 0, result.errors + run.output()
        assert result.status.restarts.process == 1
        losses = run.losses()
    assert len(losses) == 60
    assert losses[-1] < 0.75 * losses[0]
    lines = [json.loads(line) for line in (tmp_path / "diary.jsonl").read_text().splitlines()]
    starts = [line for line in lines if line["kind"] == "start"]
    assert len({line["uid"] for line in starts}) == 1  # one run
    assert starts[0]["step"] == 0
    assert starts[1]["step"] >= 10  # behind a checkpoint
    assert lines[-1] == {"kind": "end", "outcome": "finished"}
    files = list(run.run_store.glob("tensorboard/events.out.tfevents.*"))
    assert len(files) == 2  # one per process


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "trainer.model.module=ownmodel:biuld",
            "trainer.model.module: ownmodel (",
        ),
        ("trainer.recipe.loss=nowhere:loss", "trainer.recipe.loss: there is no module 'nowhere'"),
        ("trainer.callbacks.1.options.file=diary.jsonl", "give an absolute path"),
    ],
)
def test_a_mistake_in_ones_own_code_ends_with_a_sentence(tmp_path: Path, override: str, says: str) -> None:
    with LocalRun(tmp_path, [*overrides(tmp_path, 20), override], manifest=MANIFEST) as run:
        result = run.finish(120)
    assert result.code == 1
    assert says in result.errors
    assert result.status.restarts.total == 0
