"""A step folder opens without Lockstep: in place, from a downloaded copy, and from S3 with the reader of AWS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from s3torchconnector import S3ClientConfig
from s3torchconnector._s3client import S3Client
from s3torchconnector.dcp import S3StorageReader
from s3torchconnector.dcp.s3_file_system import S3FileSystem
from torch.distributed.checkpoint import FileSystemReader, StorageReader

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.storage import ObjectStore
from stored import store_from_ranks

FOLDER = "step-1-e1-g1"


@pytest.fixture
def saved(store: ObjectStore) -> ObjectStore:
    state = {"model": {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}}
    store_from_ranks(2, lambda _: state, store, samples='{"step": 1}\n')
    return store


def check(reader: StorageReader) -> None:
    state = {"model": {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}}
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(state["model"]["a"], torch.arange(12.0).view(3, 4))
    assert torch.equal(state["model"]["b"], torch.ones(5, dtype=torch.bfloat16))


def test_a_downloaded_copy(saved: ObjectStore, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in saved.list(f"{FOLDER}/"):
        (copy / entry.key.rpartition("/")[2]).write_bytes(saved.get(entry.key)[0])
    check(FileSystemReader(copy))


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_in_place(saved: ObjectStore) -> None:
    check(FileSystemReader(saved.uri.removeprefix("file://").replace("%20", " ") + f"/{FOLDER}"))


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_from_s3(saved: ObjectStore, s3_endpoint: str) -> None:
    region, path_style = S3Spec().region, S3ClientConfig(force_path_style=True)
    reader = S3StorageReader(region, f"{saved.uri}/{FOLDER}", s3client_config=path_style)
    # Its own way of naming a server that is not AWS is an argument of its client alone.
    client = S3Client(region, endpoint=s3_endpoint, s3client_config=path_style)
    reader.fs = S3FileSystem(region, s3_client=client)
    check(reader)
