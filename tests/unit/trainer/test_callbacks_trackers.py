"""Trackers show one run over all restarts, and each step of it once."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from lockstep_api.v1alpha1 import CallbackSpec
from lockstep_trainer.callbacks import Callback, Callbacks, Checkpoint, Evaluation, eventfile
from lockstep_trainer.errors import UserError
from unit.trainer.test_callbacks import run_of, step_of


def train(
    callback: Callback, folder: Path, *, start: int, end: int, loss: float, generation: int, killed: bool
) -> None:
    """One process of a job: steps behind ``start`` to ``end``, with a checkpoint at 6; a kill takes its last words."""
    callback.on_start(run_of(folder, step=start, generation=generation))
    for number in range(start + 1, end + 1):
        callback.on_step(step_of(number, loss))
        if number == 6:
            callback.on_evaluation(Evaluation(step=6, loss=loss, tokens=10, sources={"web": loss + 1}))
            callback.on_checkpoint(Checkpoint(step=6, seconds=0.1))
    if not killed:
        callback.on_end("finished")


def make(module: str, **options: Any) -> Callback:
    """A built-in callback, made as a job makes it."""
    callbacks = Callbacks.open([CallbackSpec(module=module, options=options)], leads=True)
    (thread,) = callbacks._threads
    return thread._callback


def test_checksums_are_those_of_the_standard() -> None:
    """RFC 3720, B.4."""
    assert eventfile.crc32c(bytes(32)) == 0x8A9136AA
    assert eventfile.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("flush_seconds", [0.0, 1e9], ids=["flushed", "held back until the checkpoint"])
def test_tensorboard_reads_one_run_in_which_the_newest_value_counts(tmp_path: Path, flush_seconds: float) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard, to read with"
    )
    train(
        make("tensorboard", flush_seconds=flush_seconds), tmp_path, start=0, end=9, loss=1.0, generation=1, killed=True
    )
    train(
        make("tensorboard", flush_seconds=flush_seconds),
        tmp_path,
        start=6,
        end=12,
        loss=2.0,
        generation=2,
        killed=False,
    )
    reader = event_accumulator.EventAccumulator(str(tmp_path / "ns/job/0f-uid/tensorboard"))
    reader.Reload()
    points = [(point.step, point.value) for point in reader.Scalars("train/loss")]
    assert points == [(step, 1.0 if step <= 6 else 2.0) for step in range(1, 13)]
    assert [(point.step, point.value) for point in reader.Scalars("eval/web/loss")] == [(6, 2.0)]
    assert reader.Scalars("train/loss")[0].wall_time == pytest.approx(1.7e9 + 1)
    assert {"train/mfu", "train/tokens_per_second", "seconds/forward"} <= set(reader.Tags()["scalars"])
    (spec,) = reader.Tensors("job/text_summary")
    assert b'"seed": 3' in spec.tensor_proto.string_val[0]


def test_tensorboard_in_an_object_store_goes_on_in_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment is replaced as a whole until it is full; together they are what one file would be."""
    from lockstep_trainer.callbacks import tensorboard
    from lockstep_trainer.storage import open_store

    store = open_store(tmp_path.as_uri())
    monkeypatch.setattr(tensorboard, "_SEGMENT_BYTES", 600)
    sink = tensorboard._ObjectSink(store, "events")
    sent = [eventfile.scalars(1.7e9 + number, number, {"train/loss": 1.0}) for number in range(30)]
    for data in sent:
        sink.write(data)
        sink.flush()
    contents = [store.get(entry.key)[0] for entry in store.list()]
    assert len(contents) > 2
    assert all(content.startswith(eventfile.version()) for content in contents)
    assert b"".join(content.removeprefix(eventfile.version()) for content in contents) == b"".join(sent)


def test_tensorboard_refuses_a_folder_that_is_no_uri() -> None:
    with pytest.raises(UserError, match="folder of tensorboard: '/logs' names no store"):
        make("tensorboard", folder="/logs")


def test_mlflow_finds_its_run_again_and_keeps_each_step_once(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    uri = f"file://{tmp_path}/mlruns"
    train(make("mlflow", uri=uri, flush_seconds=0.0), tmp_path, start=0, end=9, loss=1.0, generation=1, killed=True)
    train(make("mlflow", uri=uri), tmp_path, start=6, end=12, loss=2.0, generation=2, killed=False)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lockstep")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.recipe.seed"] == "3"
    points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert points == [(step, 1.0 if step <= 9 else 2.0) for step in range(1, 13)]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "eval/loss")] == [6]


@pytest.mark.parametrize(("module", "package"), [("mlflow", "mlflow-skinny"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_there_names_its_package(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{module} is not installed where the job runs; pip install {package}$"):
        make(module)


def test_mlflow_without_a_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="mlflow has no server; set its option uri"):
        make("mlflow")


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """The history in an offline run's file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; checksum,
    length and type before each fragment) with a protocol buffer in each record."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_wandb_offline_writes_parts_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"mode": "offline", "folder": str(tmp_path), "tags": "a, b"}
    train(make("wandb", **options), tmp_path, start=0, end=6, loss=1.0, generation=1, killed=False)
    train(make("wandb", **options), tmp_path, start=6, end=12, loss=2.0, generation=2, killed=False)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    assert [file.name for file in files] == ["run-0f-uid.wandb"] * 2  # the same run in both
    first, second = (wandb_rows(file) for file in files)
    assert [(row["step"], row["train/loss"]) for row in first] == [(step, 1.0) for step in range(1, 7)]
    assert [(row["step"], row["_step"]) for row in second] == [(step, step) for step in range(7, 13)]
    assert first[-1]["eval/web/loss"] == 2.0  # in the step's own row


def test_wandb_refuses_an_unknown_mode() -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    with pytest.raises(UserError, match="mode of wandb is 'off'; choose one of online, offline, disabled"):
        make("wandb", mode="off")
