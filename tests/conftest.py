"""What tests of all tiers share: one local cluster, brought up by the first test that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from localcluster import Cluster


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
