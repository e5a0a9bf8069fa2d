"""A run that goes on at another layout: whole workers, with mixing, packing and a batch ramp.

What is protected: data, tensor and pipeline width may all change between two starts; the state that is loaded is exact,
no sample is lost or repeated, the losses that follow are those of the run that never stopped, within rounding; at the
same layout they are bitwise the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor

from checker.order import Order
from forked import rendezvous_store, run_ranks, start_workers, wait_all, worker_folders
from lockstep_api.messages import RestorePoint, StateId, Term
from lockstep_api.v1alpha1 import TrainingJobSpec
from lockstep_trainer.assembly import assemble, batch_sizes
from lockstep_trainer.checkpoint.chain import Chain
from lockstep_trainer.checkpoint.manifest import Manifest
from lockstep_trainer.checkpoint.state import load_state, training_state
from lockstep_trainer.config import load_job
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel import measured
from lockstep_trainer.ranks import Ranks
from lockstep_trainer.storage import open_store
from staged import commit_staged, keeping, run_kept, staged_states
from unit.trainer.test_worker import events, losses, meeting, sample_lines

STEPS, EVERY = 10, 4

BEFORE: dict[str, Any] = {"tensor": 2}  # × shard 2
AFTER: dict[str, Any] = {"pipeline": 2, "schedule": "Interleaved1F1B"}  # shard and tensor 1

MODELS: dict[str, dict[str, Any]] = {
    "dense, tied": {"preset": "llama-debug", "overrides": {"dim": 32, "ffn_dim": 64}},
    "mixture": {"preset": "moe-debug", "overrides": {"dim": 32, "layers": 4, "expert_dim": 32}},
}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with rendezvous_store() as number:
        yield number


def write_job(root: Path, model: dict[str, Any], *, gpus: int, parallelism: dict[str, Any]) -> Path:
    """``job.json`` in ``root``, in one file per layout."""
    spec = TrainingJobSpec.model_validate(
        {
            "nodes": 1,
            "gpusPerNode": gpus,
            "parallelism": parallelism,
            "trainer": {
                "model": model,
                "tokenizer": {"train": {"kind": "bytes"}},
                "data": {
                    "sources": [
                        {"name": "mail", "uri": "file://{stdlib}/email/*.py", "weight": 3},
                        {"name": "json", "uri": "file://{stdlib}/json/*.py", "weight": 1},
                    ],
                    "stages": [{"fromStep": 6, "weights": {"mail": 1, "json": 1}}],
                    "sequenceLength": 32,
                    "packing": "bestFit",
                    "documentMask": True,
                },
                "recipe": {
                    "steps": STEPS,
                    "globalBatchTokens": 32 * 16,
                    "batchRamp": {"startTokens": 32 * 8, "steps": 6, "increments": 2},
                    "precision": "fp32",
                    "seed": 3,
                    "optimizer": {"lr": 0.003},
                    "zLoss": 1e-4,
                },
            },
            "checkpoint": {"uri": f"file://{root}/store", "every": EVERY},
        }
    )
    path = root / f"job-{'-'.join(map(str, parallelism.values()))}.json"
    path.write_text(json.dumps({"name": "job", "namespace": "ns", "uid": "uid", "spec": spec.to_wire()}))
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_goes_on_at_another_layout(tmp_path: Path, port: int, kind: str) -> None:
    before = {**BEFORE, "expert": 4} if kind == "mixture" else BEFORE
    wide = write_job(tmp_path, MODELS[kind], gpus=4, parallelism=before)
    narrow = write_job(tmp_path, MODELS[kind], gpus=2, parallelism=AFTER)
    chain = Chain(open_store(f"file://{tmp_path}/store"), "ns/job/uid")
    chain.fence(Term(1, 1), "test")

    def folders(job: Path, ranks: int, generation: int, point: RestorePoint | None) -> list[Path]:
        return worker_folders(
            tmp_path,
            job,
            ranks=ranks,
            port=port,
            generation=generation,
            rendezvous=meeting(port, f"{kind}/{generation}"),
            restore=point and asdict(point),
        )

    undisturbed = folders(wide, 4, 1, None)
    with keeping(undisturbed[0]):
        pids = start_workers(undisturbed)
        point = commit_staged(chain, undisturbed[0], EVERY, Term(1, 1), 240)
        assert wait_all(pids) == [0] * 4, (undisturbed[0] / "output.log").read_text()
    expected = {step: value for step, value in losses(undisturbed[0]).items() if step > point.state.step}

    same = folders(wide, 4, 2, point)
    assert run_kept(same) == [0] * 4
    assert losses(same[0]) == expected, "the same layout, bit for bit"

    check_exact(tmp_path, narrow, chain, point)
    other = folders(narrow, 2, 3, point)
    assert run_kept(other) == [0, 0], (other[0] / "output.log").read_text()
    found = losses(other[0])
    assert found.keys() == expected.keys()
    for step, (loss, norm) in found.items():
        assert loss == pytest.approx(expected[step][0], rel=1e-5)
        assert norm == pytest.approx(expected[step][1], rel=1e-3)
    assert events(other[0], "restore")[0]["step"] == point.state.step

    commit_staged(chain, other[0], STEPS, Term(1, 3))
    check_samples(chain)


def test_a_measured_split_stays_for_the_snapshots_in_memory(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is never twice as fast as it was. Workers are forks of this process."""
    model = {"preset": "llama-debug", "overrides": {"dim": 32, "layers": 4, "ffn_dim": 64}}
    job = write_job(tmp_path, model, gpus=2, parallelism={"pipeline": 2, "split": "measured"})
    known: StateId | None = None
    for generation, costs in ((1, [3.0, 0.0, 1.0]), (2, [0.0, 3.0, 1.0])):
        monkeypatch.setattr(measured, "_measure", lambda *_, costs=costs, **__: costs)
        folders = worker_folders(
            tmp_path,
            job,
            ranks=2,
            port=port,
            generation=generation,
            rendezvous=meeting(port, f"measured/{generation}"),
            memory=known and {"state": asdict(known)},
        )
        assert run_kept(folders) == [0, 0], (folders[0] / "output.log").read_text()
        known = known or staged_states(folders[0])[-1]
    (restored,) = events(folders[0], "restore")
    assert (restored["source"], restored["step"]) == ("memory", STEPS)


def check_exact(root: Path, path: Path, chain: Chain, point: RestorePoint) -> None:
    """Load the checkpoint at the layout of the job at ``path``, and compare every element with torch's own reading."""
    manifest = chain.manifest(point)
    dcp_to_torch_save(root / "store/ns/job/uid" / manifest.folder, root / "whole")
    whole = torch.load(root / "whole")

    def compare(rank: int) -> None:
        job = load_job(path)
        ranks = Ranks(rank, 2, torch.device("cpu"), torch.distributed.group.WORLD)
        found = assemble(job, ranks, batch_sizes(job, 2), tokens=257, timeout=timedelta(seconds=60), section=no_section)
        parameters = list(found.engine.named_parameters())
        state = training_state(
            found.engine.state(), parameters, build_optimizer(parameters, job.trainer.recipe.optimizer)
        )
        load_state(state, chain.store, manifest.folder, manifest, group=ranks.control)
        assert 0 < len(state["model"]) < len(whole["model"]), "each pipeline rank has a part"
        same(state["model"], whole["model"], "model")
        same(state["optimizer"], whole["optimizer"], "optimizer")

    run_ranks(2, compare)


def same(found: Any, whole: Any, name: str) -> None:
    if isinstance(found, dict):
        for key, value in found.items():
            same(value, whole[key], f"{name}.{key}")
        return
    full = found.full_tensor() if isinstance(found, DTensor) else found
    assert torch.equal(full, whole), name
    assert bool(full.any()) or "step" in name or full.numel() < 64, f"{name} is all zeros"


def no_section(_: str) -> Any:
    from contextlib import nullcontext

    return nullcontext()


def check_samples(chain: Chain) -> None:
    """Along the chain every sample of the contract's order is consumed exactly once."""
    manifests = [each for _, each in chain.lineage(chain.latest()) if isinstance(each, Manifest)]
    assert [(each.state.step, each.layout.data_width, each.layout.pipeline) for each in manifests] == [
        (STEPS, 1, 2),
        (EVERY, 2, 1),
    ]
    lines = [line for each in manifests for line in sample_lines(chain, each)]
    consumed: dict[int, list[tuple[int, int]]] = {}
    for line in sorted(lines, key=lambda line: (line["step"], line["rank"])):
        drawn = zip(line["sources"], line["samples"], strict=True)
        consumed.setdefault(line["step"], []).extend(drawn)
    order = Order(manifests[0].sampler.model_dump())
    assert consumed == {step: list(map(tuple, order.of_step(step))) for step in range(1, STEPS + 1)}
    assert [len(consumed[step]) for step in (1, 4, 7, STEPS)] == [8, 12, 16, 16], "the batch grows"
