"""What a step draws at random is a function of the step: a restart changes no bit, and replicas draw differently."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from forked import rendezvous_store, start_workers, wait_all, worker_folders
from lockstep_api.messages import Term
from lockstep_api.v1alpha1 import TrainingJobSpec
from lockstep_trainer.checkpoint.chain import Chain
from lockstep_trainer.modules import PATH_VARIABLE
from lockstep_trainer.randomness import seed_step
from lockstep_trainer.steprecord import StepReader
from lockstep_trainer.storage import open_store
from staged import commit_staged, keeping, run_kept

CPU = torch.device("cpu")


def drawn(seed: int, step: int, data_rank: int) -> list[float]:
    seed_step(seed, step, data_rank, CPU)
    return torch.rand(4).tolist()


def test_seed_step_and_rank_are_all_that_counts() -> None:
    with torch.random.fork_rng(devices=[]):
        found = {which: drawn(*which) for which in ((1, 5, 0), (2, 5, 0), (1, 6, 0), (1, 5, 1))}
        torch.rand(100)
        assert drawn(1, 5, 0) == found[1, 5, 0]
    assert len({tuple(numbers) for numbers in found.values()}) == 4


def test_a_model_that_draws_goes_on_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with dropout, of which the second generation begins behind a checkpoint."""
    monkeypatch.setenv(PATH_VARIABLE, str(Path(__file__).parent))
    trainer = {
        "model": {"module": "own_dropout:dropping"},
        "tokenizer": {"train": {"kind": "bytes"}},
        "data": {"sources": [{"uri": "file://{stdlib}/email/**/*.py"}], "sequenceLength": 16},
        "recipe": {"steps": 12, "globalBatchTokens": 64, "precision": "fp32"},
    }
    uri = f"file://{tmp_path}/store"
    spec = TrainingJobSpec.model_validate(
        {"nodes": 1, "gpusPerNode": 2, "trainer": trainer, "checkpoint": {"uri": uri, "every": 4}}
    )
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"name": "job", "namespace": "ns", "uid": "uid", "spec": spec.to_wire()}))
    chain = Chain(open_store(uri), "ns/job/uid")
    chain.fence(Term(1, 1), "test")
    with rendezvous_store() as port:
        first = worker_folders(tmp_path, job, ranks=2, port=port)
        with keeping(first[0]):
            pids = start_workers(first)
            point = commit_staged(chain, first[0], 4, Term(1, 1))
            assert wait_all(pids) == [0, 0], (first[0] / "output.log").read_text()
        second = worker_folders(tmp_path, job, ranks=2, port=port, generation=2, restore=asdict(point))
        assert run_kept(second) == [0, 0], (second[0] / "output.log").read_text()
    whole, rest = (
        {each.step: each.loss for each in StepReader(f / "steps").new_records()} for f in (first[0], second[0])
    )
    assert rest == {step: loss for step, loss in whole.items() if step > point.state.step}
    assert rest
