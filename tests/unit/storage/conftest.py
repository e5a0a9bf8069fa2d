"""Stores to test: a folder, and a real S3 server: the one that LOCKSTEP_TEST_S3_ENDPOINT names (credentials in AWS_*),
or the local cluster's, started for the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.storage import ObjectStore, open_store
from s3server import BUCKET, S3Server, server_or_skip

_BUCKET = os.environ.get("LOCKSTEP_TEST_S3_BUCKET", BUCKET)


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server with an empty bucket."""
    if given := os.environ.get("LOCKSTEP_TEST_S3_ENDPOINT"):
        _make_bucket(given)
        yield given
        return
    server = server_or_skip(tmp_path_factory.mktemp("server"))
    with credentials(server), server:
        yield server.endpoint


@pytest.fixture
def stopped_server(tmp_path: Path) -> Iterator[S3Server]:
    """A server of the test's own, not yet started, and this process's credentials for it."""
    server = server_or_skip(tmp_path / "server")
    with credentials(server):
        yield server


@contextmanager
def credentials(server: S3Server) -> Iterator[None]:
    """This process, and what it forks, may use it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.credentials.items():
            patch.setenv(name, value)
        yield


def _make_bucket(endpoint: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint, region_name=S3Spec().region)
    if _BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=_BUCKET)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of each kind."""
    if request.param == "folder":
        return open_store(f"file://{tmp_path}/with%20space")
    endpoint = request.getfixturevalue("s3_endpoint")
    return open_store(f"s3://{_BUCKET}/{uuid4().hex}", S3Spec(endpoint=endpoint, path_style=True))
