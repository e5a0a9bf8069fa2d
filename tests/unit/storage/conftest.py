"""Stores to test: a folder, and a real S3 server: the one that LOCKSTEP_TEST_S3_ENDPOINT names (credentials in AWS_*),
or the local cluster's, started for the tests."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from localcluster import build
from lockstep_api.v1alpha1 import S3Spec
from lockstep_trainer.storage import ObjectStore, open_store

_BUCKET = os.environ.get("LOCKSTEP_TEST_S3_BUCKET", "lockstep-test")


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server with an empty bucket."""
    if given := os.environ.get("LOCKSTEP_TEST_S3_ENDPOINT"):
        _make_bucket(given)
        yield given
        return
    server = S3Server(tmp_path_factory.mktemp("buckets"))
    with server.credentials(), server.running():
        _make_bucket(server.endpoint)
        yield server.endpoint


@pytest.fixture
def s3_server(tmp_path: Path) -> Iterator[S3Server]:
    """A server of the test's own, not yet started, and this process's credentials for it."""
    server = S3Server(tmp_path / "buckets")
    server.folder.mkdir()
    with server.credentials():
        yield server


class S3Server:
    """The local cluster's S3 server on a folder; it can be ended and started again."""

    def __init__(self, folder: Path) -> None:
        program = build.programs().get("versitygw")
        if program is None:
            reason = "no S3 server; `python -m localcluster build versitygw` builds one"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self._secret = folder, secrets.token_hex(16)
        self._command = [str(program), f"--port=127.0.0.1:{self.port}", "--quiet", "posix", str(folder)]

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def credentials(self) -> Iterator[None]:
        """This process, and what it forks, may use it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", self._secret)
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """It answers while the body runs, and dies at once behind it."""
        own = {"ROOT_ACCESS_KEY": "test", "ROOT_SECRET_KEY": self._secret}
        with subprocess.Popen(self._command, env={**os.environ, **own}, stdout=subprocess.DEVNULL) as server:
            try:
                _wait_listening(self.port, server)
                yield
            finally:
                server.kill()


def _wait_listening(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, f"the S3 server ended with {server.returncode}"
            assert time.monotonic() < deadline, "the S3 server does not listen"
            time.sleep(0.05)


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
