"""A store that is away while a job needs its data: the job waits, as long as it takes, and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import numpy as np
import pytest

from awaited import eventually
from forked import rendezvous_store, start_workers, wait_all, worker_folders
from lockstep_api.v1alpha1 import S3Spec, TokenizerTraining, TrainingJobSpec
from lockstep_trainer.data.tokenizer import tokenizer_hash, train_tokenizer
from lockstep_trainer.data.tokens import ShardWriter
from lockstep_trainer.errors import StoreError
from lockstep_trainer.outage import outlast
from lockstep_trainer.sections import Sections
from lockstep_trainer.steprecord import StepReader, StepWriter
from lockstep_trainer.tenure import Left
from staged import keeping, run_kept

if TYPE_CHECKING:
    from s3server import S3Server

STEPS, LENGTH, SAMPLES = 150, 16, 8
AWAY = StoreError("read s3://texts/0: no connection", temporary=True)


def write_shards(folder: Path) -> None:
    """Token shards of bytes, with more samples than the job takes."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(7)
    with ShardWriter(
        folder / "0.tokens", 2, tokenizer_hash(train_tokenizer([], TokenizerTraining(kind="bytes")))
    ) as writer:
        for _ in range(2_000):
            writer.add([*numbers.integers(32, 127, size=int(numbers.integers(8, 60))).tolist(), 256])


def write_job(root: Path, uri: str, endpoint: str) -> Path:
    """A job of two ranks that reads these shards at every step."""
    root.mkdir(exist_ok=True)
    spec = TrainingJobSpec.model_validate(
        {
            "nodes": 1,
            "gpusPerNode": 2,
            "trainer": {
                "model": {"preset": "llama-debug", "overrides": {"dim": 32, "layers": 1, "ffn_dim": 64}},
                "tokenizer": {"train": {"kind": "bytes"}},
                "data": {"sources": [{"uri": uri}], "sequenceLength": LENGTH, "holdout": 0.2},
                "recipe": {"steps": STEPS, "globalBatchTokens": LENGTH * SAMPLES, "precision": "fp32"},
                "evaluate": {"every": 40, "batches": 2},
            },
            "checkpoint": {
                "uri": f"file://{root}/store",
                "every": 10_000,
                "s3": {"endpoint": endpoint, "pathStyle": True},
            },
        }
    )
    path = root / "job.json"
    path.write_text(json.dumps({"name": "job", "namespace": "ns", "uid": "uid", "spec": spec.to_wire()}))
    return path


def losses(folder: Path) -> dict[int, float]:
    return {record.step: record.loss for record in StepReader(folder / "steps").new_records()}


def test_a_job_waits_for_its_data_before_the_first_step_and_between_two(
    tmp_path: Path, stopped_server: S3Server
) -> None:
    write_shards(tmp_path / "texts")
    with rendezvous_store() as port:

        def folders(name: str, uri: str) -> list[Path]:
            root = tmp_path / name
            job = write_job(root, uri, stopped_server.endpoint)
            meeting = {"host": "127.0.0.1", "port": port, "prefix": name}
            return worker_folders(root, job, ranks=2, port=port, rendezvous=meeting)

        calm = folders("calm", f"file://{tmp_path}/texts/*.tokens")
        assert run_kept(calm) == [0, 0], (calm[0] / "output.log").read_text()

        with stopped_server:
            # A session of its own: the default one keeps the credentials that it saw first.
            client = boto3.session.Session().client(
                "s3", endpoint_url=stopped_server.endpoint, region_name=S3Spec().region
            )
            client.create_bucket(Bucket="texts")
            for path in (tmp_path / "texts").iterdir():
                client.put_object(Bucket="texts", Key=path.name, Body=path.read_bytes())
        remote = folders("remote", "s3://texts/*.tokens")
        pids = start_workers(remote)

        def waiting() -> int:
            readers = [StepReader(folder / "steps") for folder in remote if (folder / "steps").exists()]
            return sum(reader.section == "outage" for reader in readers)

        def step() -> int:
            return max(losses(remote[0]), default=0)

        eventually(lambda: waiting() == 2, "both ranks say that they wait for the store", 60)
        assert step() == 0
        with stopped_server:
            eventually(lambda: step() >= 10, "steps", 60)
        # The other one may have read its samples just in time: then it waits for this one in a collective.
        eventually(waiting, "a rank waits between two steps", 60)
        assert 10 <= step() < STEPS, "the outage came in the midst of the run"
        with stopped_server, keeping(remote[0]):
            assert wait_all(pids) == [0, 0], (remote[0] / "output.log").read_text()
    assert losses(remote[0]) == losses(calm[0])
    assert len(losses(calm[0])) == STEPS


def sections(tmp_path: Path, **arguments: Any) -> Sections:
    return Sections(StepWriter.create(tmp_path / "steps"), **arguments)


def test_only_what_may_pass_is_waited_for(tmp_path: Path) -> None:
    problems = [AWAY, AWAY, StoreError("read s3://texts/0: access denied")]

    def call() -> int:
        raise problems.pop(0)

    paused: list[float] = []
    with pytest.raises(StoreError, match="access denied"):
        outlast(call, sections(tmp_path), paused.append)
    assert paused == [1.0, 2.0]


def test_a_generation_that_ends_is_not_kept_waiting(tmp_path: Path) -> None:
    paused: list[float] = []

    def check() -> None:
        if len(paused) == 3:
            raise Left("told to leave")

    def call() -> int:
        raise AWAY

    with pytest.raises(Left):
        outlast(call, sections(tmp_path, check=check), paused.append)
