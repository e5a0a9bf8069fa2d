"""The cluster with Lockstep in it."""

from __future__ import annotations

import os

import pytest

from demonstration import install
from demonstration.target import Target
from e2e.jobs import BUCKET, NAMESPACE
from localcluster import Cluster


@pytest.fixture(scope="session")
def prepared(cluster: Cluster) -> Target:
    """The local cluster with the images on its nodes."""
    target = Target.local(cluster)
    # The checker reads S3 with the tools' usual variables.
    os.environ.update(AWS_ACCESS_KEY_ID=target.s3.access_key, AWS_SECRET_ACCESS_KEY=target.s3.secret_key)
    install.load_images(target, install.build_images(target))
    return target


@pytest.fixture(scope="module")
def lockstep(prepared: Target) -> Target:
    """The operator installed by the chart, a namespace and a bucket. Anew for each module: the chart's own tests
    uninstall the release, wherever they come in the order."""
    # Two operators: one may lose its node.
    install.helm_install(prepared, {"replicas": 2})
    install.prepare_namespace(prepared, NAMESPACE, BUCKET)
    return prepared
