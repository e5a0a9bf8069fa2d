"""Whole workers: two ranks, a real store, and a leader played by the test.

What is protected: a run that was killed and restored is bitwise the run that never was, at the same layout; no sample
is lost or repeated; a damaged checkpoint sends the workers to its parent; the user's mistakes end with a sentence.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from checker.order import Order
from forked import rendezvous_store, start_workers, wait_all, worker_folders
from lockstep_api.messages import RestorePoint, StateId, Term
from lockstep_api.v1alpha1 import TrainingJobSpec
from lockstep_trainer.checkpoint.chain import Chain, resolve
from lockstep_trainer.checkpoint.export import stated
from lockstep_trainer.checkpoint.keeper import Keeper
from lockstep_trainer.checkpoint.manifest import Manifest
from lockstep_trainer.checkpoint.snapshots import held, rank_folder
from lockstep_trainer.config import check_work, load_job, load_orders
from lockstep_trainer.model.presets import find
from lockstep_trainer.steprecord import StepReader
from lockstep_trainer.storage import open_store
from staged import commit_staged, keeping, run_kept, snapshots_of, staged_states, until_staged

STEPS, EVERY = 24, 4
SAMPLES_PER_STEP = 8


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with rendezvous_store() as number:
        yield number


def write_job(root: Path, **trainer: Any) -> Path:
    """A small job in ``root``; keyword arguments replace parts of spec.trainer."""
    spec = TrainingJobSpec.model_validate(
        {
            "nodes": 1,
            "gpusPerNode": 2,
            "trainer": {
                "model": {"preset": "llama-debug", "overrides": {"dim": 32, "layers": 2, "ffn_dim": 64}},
                "tokenizer": {"train": {"vocabSize": 320}},
                "data": {
                    "sources": [{"uri": "file://{stdlib}/email/**/*.py"}],
                    "sequenceLength": 16,
                    "holdout": 0.3,
                },
                "recipe": {
                    "steps": STEPS,
                    "globalBatchTokens": 16 * SAMPLES_PER_STEP,
                    "precision": "fp32",
                    "seed": 3,
                    "optimizer": {"lr": 0.01},
                    "schedule": {"warmup": 3},
                },
                "evaluate": {"every": 5, "batches": 2},
                "generate": {"prompt": "def ", "tokens": 4},
                **trainer,
            },
            "checkpoint": {"uri": f"file://{root}/store", "every": EVERY},
        }
    )
    path = root / "job.json"
    path.write_text(json.dumps({"name": "job", "namespace": "ns", "uid": "uid", "spec": spec.to_wire()}))
    return path


def restore_orders(point: RestorePoint | None) -> dict[str, Any]:
    return {"restore": point and asdict(point)}


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Step → (loss, gradient norm), all bits of both."""
    return {record.step: (record.loss, record.grad_norm) for record in StepReader(folder / "steps").new_records()}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def sample_lines(chain: Chain, manifest: Manifest) -> list[dict[str, Any]]:
    names = [file.name for file in manifest.files if file.name.startswith("samples-")]
    return [json.loads(line) for name in names for line in chain.store.get(f"{manifest.folder}/{name}")[0].splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, port: int) -> Path:
    """Folder of rank 0 of a run that nothing disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    folders = worker_folders(root, write_job(root), ranks=2, port=port, rendezvous=meeting(port, "undisturbed"))
    assert run_kept(folders) == [0, 0], (folders[0] / "output.log").read_text()
    return folders[0]


def meeting(port: int, prefix: str) -> dict[str, Any]:
    return {"host": "127.0.0.1", "port": port, "prefix": prefix}


def test_a_run_leaves_what_its_agent_needs(undisturbed: Path) -> None:
    records = StepReader(undisturbed / "steps").new_records()
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    assert records[-1].loss < records[0].loss - 0.5
    assert all(record.tokens == 16 * SAMPLES_PER_STEP for record in records)
    assert {"load", "forward", "backward", "collective", "optimizer"} <= records[1].sections.keys()
    own = [record.own for record in records]
    assert all(each and each.tokens == 16 * SAMPLES_PER_STEP // 2 and each.compute > 0 for each in own)
    assert [bool(each and each.product and each.copy) for each in own[8:17]] == [True, *[False] * 7, True]
    found = events(undisturbed, "evaluate")
    assert [event["step"] for event in found] == [5, 10, 15, 20, STEPS]
    assert found[-1]["bigram_loss"] > 0
    assert "bigram_loss" not in found[0]
    assert found[-1]["tokens"] == found[0]["tokens"] > 0
    (text,) = events(undisturbed, "text")
    assert text["prompt"] == "def "
    assert staged_states(undisturbed)[-1].step == STEPS


def test_the_step_behind_a_snapshot_tells_how_long_that_took(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step waits in the same section, for next to nothing."""
    take = Keeper.take

    def taken_slowly(self: Keeper, *args: Any) -> None:
        time.sleep(0.1)
        take(self, *args)

    monkeypatch.setattr(Keeper, "take", taken_slowly)  # workers are forks of this process
    folders = worker_folders(tmp_path, write_job(tmp_path), ranks=2, port=port, rendezvous=meeting(port, "taken"))
    assert run_kept(folders) == [0, 0], (folders[0] / "output.log").read_text()
    records = StepReader(folders[0] / "steps").new_records()
    assert records[EVERY].sections["stage"] >= 0.1


def test_a_killed_and_restored_run_is_bitwise_the_undisturbed_one(tmp_path: Path, port: int, undisturbed: Path) -> None:
    job = write_job(tmp_path)
    chain = Chain(open_store(f"file://{tmp_path}/store"), "ns/job/uid")
    chain.fence(Term(1, 1), "test")
    folders = worker_folders(tmp_path, job, ranks=2, port=port, rendezvous=meeting(port, "killed/1"))
    with keeping(folders[0]):
        pids = start_workers(folders)
        point = commit_staged(chain, folders[0], EVERY, Term(1, 1))
        os.kill(pids[1], signal.SIGKILL)
        codes = wait_all(pids)
    assert codes[1] in (-signal.SIGKILL, 0)  # 0: it was faster than the kill
    assert codes[0] == (75 if codes[1] else 0)

    again = worker_folders(
        tmp_path,
        job,
        ranks=2,
        port=port,
        generation=2,
        rendezvous=meeting(port, "killed/2"),
        **restore_orders(point),
    )
    assert run_kept(again) == [0, 0], (again[0] / "output.log").read_text()
    expected = losses(undisturbed)
    resumed = losses(again[0])
    assert resumed == {step: value for step, value in expected.items() if step > point.state.step}
    before = losses(folders[0])
    assert before == {step: expected[step] for step in before}
    assert events(again[0], "text")[0]["text"] == events(undisturbed, "text")[0]["text"]
    assert events(again[0], "evaluate")[-1]["loss"] == events(undisturbed, "evaluate")[-1]["loss"]

    # Along the chain every sample of the contract's order is consumed exactly once.
    commit_staged(chain, again[0], STEPS, Term(1, 2))
    manifests = [manifest for _, manifest in chain.lineage(chain.latest())]
    assert [manifest.state.step for manifest in manifests if isinstance(manifest, Manifest)] == [
        STEPS,
        point.state.step,
    ]
    lines = [line for each in manifests if isinstance(each, Manifest) for line in sample_lines(chain, each)]
    consumed = sorted((line["step"], line["rank"], line["sources"], line["samples"]) for line in lines)
    (newest,) = [each for each in manifests[:1] if isinstance(each, Manifest)]
    order, share = Order(newest.sampler.model_dump()), SAMPLES_PER_STEP // 2
    expected_draws = []
    for step in range(1, STEPS + 1):
        draws = order.of_step(step)
        for rank in (0, 1):
            part = draws[rank * share : (rank + 1) * share]
            expected_draws.append((step, rank, [source for source, _ in part], [sample for _, sample in part]))
    assert consumed == expected_draws
    assert newest.sampler.drawn == STEPS * SAMPLES_PER_STEP
    assert newest.model is not None
    changes = {name: newest.model[name] for name in ("dim", "layers", "ffn_dim", "vocab_size")}
    assert changes == {"dim": 32, "layers": 2, "ffn_dim": 64, "vocab_size": 320}
    assert stated(newest) == replace(find("llama-debug").config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [False, True], ids=["whole", "damaged"])
def test_a_killed_run_goes_on_from_memory(tmp_path: Path, port: int, undisturbed: Path, *, damage: bool) -> None:
    """With nothing in the store but an older state. A byte that is wrong sends all ranks there."""
    job = write_job(tmp_path)
    chain = Chain(open_store(f"file://{tmp_path}/store"), "ns/job/uid")
    chain.fence(Term(1, 1), "test")
    folders = worker_folders(tmp_path, job, ranks=2, port=port, rendezvous=meeting(port, f"memory/1/{damage}"))
    with keeping(folders[0]):
        pids = start_workers(folders)
        point = commit_staged(chain, folders[0], EVERY, Term(1, 1))
        until_staged(folders[0], point.state.step + 1)
        os.kill(pids[0], signal.SIGKILL)
        wait_all(pids)
    state = staged_states(folders[0])[-1]
    assert state.step > point.state.step
    if damage:
        flip_a_bit(rank_folder(snapshots_of(folders[0]), 1), state)
    again = worker_folders(
        tmp_path,
        job,
        ranks=2,
        port=port,
        generation=2,
        rendezvous=meeting(port, f"memory/2/{damage}"),
        memory={"state": asdict(state)},
        **restore_orders(point),
    )
    assert run_kept(again) == [0, 0], (again[0] / "output.log").read_text()
    (restored,) = events(again[0], "restore")
    begun = point.state.step if damage else state.step
    assert (restored["source"], restored["step"]) == ("store" if damage else "memory", begun)
    assert len(events(again[0], "checkpoint_problem")) == damage
    expected = losses(undisturbed)
    assert losses(again[0]) == {step: value for step, value in expected.items() if step > begun}
    # The log of samples goes back to the durable state, over the one in memory.
    commit_staged(chain, again[0], STEPS, Term(1, 2))
    lines = [line for _, each in chain.lineage(chain.latest()) for line in sample_lines(chain, each)]  # type: ignore[arg-type]
    assert sorted((line["step"], line["rank"]) for line in lines) == [
        (step, rank) for step in range(1, STEPS + 1) for rank in (0, 1)
    ]


def flip_a_bit(folder: Path, state: StateId) -> None:
    (number,) = (number for number, snapshot in held(folder).items() if snapshot.state == state)
    with (folder / f"buffer-{number}").open("r+b") as file:
        file.seek(800)  # behind the head of the first archive
        byte = file.read(1)[0]
        file.seek(800)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_checkpoint_sends_the_workers_to_its_parent(tmp_path: Path, port: int, undisturbed: Path) -> None:
    job = write_job(tmp_path)
    chain = Chain(open_store(f"file://{tmp_path}/store"), "ns/job/uid")
    chain.fence(Term(1, 1), "test")
    folders = worker_folders(tmp_path, job, ranks=2, port=port, rendezvous=meeting(port, "damaged/1"))
    pids = start_workers(folders)
    parent = commit_staged(chain, folders[0], EVERY, Term(1, 1))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_all(pids)
    folders = worker_folders(
        tmp_path,
        job,
        ranks=2,
        port=port,
        generation=2,
        rendezvous=meeting(port, "damaged/2"),
        **restore_orders(parent),
    )
    assert run_kept(folders) == [0, 0]
    newest = commit_staged(chain, folders[0], STEPS, Term(1, 2))
    assert chain.manifest(newest).parent == parent
    key = f"step-{STEPS}-e1-g2/__1_0.distcp"
    data, _ = chain.store.get(key)
    chain.store.put(key, data[:99] + bytes([data[99] ^ 8]) + data[100:])

    chain.fence(Term(2, 1), "test")
    again = worker_folders(
        tmp_path, job, ranks=2, port=port, epoch=2, rendezvous=meeting(port, "damaged/3"), **restore_orders(newest)
    )
    assert run_kept(again) == [0, 0], (again[0] / "output.log").read_text()
    (problem,) = events(again[0], "checkpoint_problem")
    assert key in problem["message"]
    assert events(again[0], "restore")[0]["step"] == parent.state.step
    expected = losses(undisturbed)
    assert losses(again[0]) == {step: value for step, value in expected.items() if step > parent.state.step}
    assert commit_staged(chain, again[0], STEPS, Term(2, 1)).state.epoch == 2
    assert chain.manifest(chain.newest() or newest).parent == parent


def test_a_job_begins_from_another_ones_checkpoint(tmp_path: Path, port: int) -> None:
    """Other data is said and not refused; a damaged file is the mistake of the field that names the checkpoint."""
    first = Chain(open_store(f"file://{tmp_path}/first"))
    first.fence(Term(1, 1), "test")
    folders = worker_folders(tmp_path, write_job(tmp_path), ranks=2, port=port, rendezvous=meeting(port, "other/1"))
    pids = start_workers(folders)
    own = commit_staged(first, folders[0], EVERY, Term(1, 1))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_all(pids)
    resumed = restore_orders(resolve(f"{first.store.uri}/{own.manifest}"))
    recipe = {"steps": EVERY + 1, "globalBatchTokens": 16 * SAMPLES_PER_STEP, "precision": "fp32", "seed": 4}
    job = write_job(tmp_path, recipe=recipe, evaluate=None, generate=None)
    going = worker_folders(
        tmp_path, job, ranks=2, port=port, generation=2, rendezvous=meeting(port, "other/2"), **resumed
    )
    assert run_kept(going) == [0, 0], (going[0] / "output.log").read_text()
    (changed,) = events(going[0], "data_changed")
    assert (changed["step"], changed["message"]) == (own.state.step, "the seed was 3, and is 4 now")

    key = f"{first.manifest(own).folder}/__1_0.distcp"
    first.store.put(key, first.store.get(key)[0][:-1] + b"x")
    Chain(open_store(f"file://{tmp_path}/store"), "ns/job/uid").fence(Term(1, 3), "test")
    again = worker_folders(
        tmp_path, job, ranks=2, port=port, generation=3, rendezvous=meeting(port, "other/3"), **resumed
    )
    assert run_kept(again) == [65, 65]
    said = json.loads((again[0] / "error.json").read_text())["message"]
    assert said.startswith(f"checkpoint.resumeFrom: {first.store.uri}/{key}: ")
    assert f"`lockstep checkpoint verify --all {first.store.uri}` says which" in said


def test_a_finished_run_that_is_started_again_only_reports(tmp_path: Path, port: int, undisturbed: Path) -> None:
    """A fault behind the last checkpoint: nothing is left to train, evaluation and text are still due."""
    job = write_job(tmp_path)
    chain = Chain(open_store(f"file://{tmp_path}/store"), "ns/job/uid")
    chain.fence(Term(1, 1), "test")
    folders = worker_folders(tmp_path, job, ranks=2, port=port, rendezvous=meeting(port, "finished/1"))
    assert run_kept(folders) == [0, 0]
    point = commit_staged(chain, folders[0], STEPS, Term(1, 1))
    # At another layout: one rank instead of two.
    again = worker_folders(
        tmp_path, job, ranks=1, port=port, generation=2, rendezvous=meeting(port, "finished/2"), **restore_orders(point)
    )
    assert run_kept(again) == [0]
    assert losses(again[0]) == {}
    assert staged_states(again[0]) == []
    loss = events(again[0], "evaluate")[-1]["loss"]
    assert loss == pytest.approx(events(undisturbed, "evaluate")[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"preset": "llama9"}}, "choose one of llama-debug"),
        (
            {"data": {"sources": [{"uri": "file:///nowhere/*.py"}], "sequenceLength": 16, "holdout": 0.3}},
            "matches no file",
        ),
        (
            {
                "data": {"sources": [{"uri": "file://{stdlib}/json/tool.py"}], "sequenceLength": 131072},
                "recipe": {"steps": 1, "globalBatchTokens": 262144},
                "evaluate": None,
            },
            "lower trainer.data.sequenceLength",
        ),
    ],
)
def test_the_users_mistakes_end_with_65_and_a_sentence(
    tmp_path: Path, port: int, change: dict[str, Any], message: str
) -> None:
    folders = worker_folders(
        tmp_path, write_job(tmp_path, **change), ranks=2, port=port, rendezvous=meeting(port, str(tmp_path))
    )
    assert run_kept(folders) == [65, 65]
    for folder in folders:
        error = json.loads((folder / "error.json").read_text())
        assert error["user_error"]
        assert message in error["message"]


FOREIGN = "file:///kept/ns/other/uid0/step-24-e1-g1/manifest.json"
NOTHING_BEHIND = {"evaluate": None, "generate": None}


def test_another_jobs_checkpoint_at_the_last_step_leaves_nothing_to_do(tmp_path: Path, port: int) -> None:
    """It would succeed without a step and without a checkpoint."""
    point = RestorePoint(StateId(STEPS, 1, 1), FOREIGN, "00")
    job = write_job(tmp_path, **NOTHING_BEHIND)
    folders = worker_folders(tmp_path, job, ranks=2, port=port, **restore_orders(point))
    assert run_kept(folders) == [65, 65]
    message = json.loads((folders[1] / "error.json").read_text())["message"]
    assert message == (
        f"checkpoint.resumeFrom: {FOREIGN} is at step 24 of 24 already, and no step is left to train; "
        "raise trainer.recipe.steps"
    )


@pytest.mark.parametrize(
    ("changes", "step", "manifest"),
    [
        (NOTHING_BEHIND, STEPS - 1, FOREIGN),
        (NOTHING_BEHIND, STEPS, "step-24-e1-g1/manifest.json"),  # its own: it was started again behind the last save
        ({**NOTHING_BEHIND, "export": {"uri": "file:///model"}}, STEPS, FOREIGN),
        ({"evaluate": None}, STEPS, FOREIGN),
        ({"generate": None}, STEPS + 1, FOREIGN),
    ],
)
def test_what_is_to_be_done_at_the_last_step_is_done(
    tmp_path: Path, changes: dict[str, Any], step: int, manifest: str
) -> None:
    job = write_job(tmp_path, **changes)
    point = RestorePoint(StateId(step, 1, 1), manifest, "00")
    (folder,) = worker_folders(tmp_path, job, ranks=1, port=1, **restore_orders(point))
    check_work(load_job(job), load_orders(folder / "start.json"))


def test_pods_with_different_text_are_refused(tmp_path: Path, port: int) -> None:
    (tmp_path / "other").mkdir()
    other = {"sources": [{"uri": "file://{stdlib}/asyncio/**/*.py"}], "sequenceLength": 16, "holdout": 0.3}
    jobs = [write_job(tmp_path), write_job(tmp_path / "other", data=other)]
    folders = worker_folders(tmp_path, jobs[0], ranks=2, port=port, rendezvous=meeting(port, "different"))
    start = json.loads((folders[1] / "start.json").read_text())
    (folders[1] / "start.json").write_text(json.dumps({**start, "job": str(jobs[1])}))
    assert run_kept(folders) == [65, 65]
    assert "rank 1 differ from those of rank 0" in json.loads((folders[0] / "error.json").read_text())["message"]
