"""What tests of all tiers share: one local cluster, brought up by the first test that asks for it; an S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from localcluster import Cluster
from s3server import S3Server, server_or_skip


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """A real API server, scheduler and controller manager, perhaps without nodes. One that is up already is used and
    left up."""
    was_up = Cluster().exists
    cluster = Cluster.up(nodes=0)
    yield cluster
    if not was_up:
        cluster.down()


@pytest.fixture(scope="session")
def cluster(control_plane: Cluster) -> Cluster:
    """The same with three nodes of two GPUs."""
    return Cluster.up(nodes=3, gpus=2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    """An S3 server of the test's own, which can be killed and started again."""
    with server_or_skip(tmp_path / "server") as one:
        yield one
