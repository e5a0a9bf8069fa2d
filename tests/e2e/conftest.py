"""The cluster with Lockstep in it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from demonstration import install
from demonstration.target import DemoError, Target
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
def lockstep(prepared: Target) -> Iterator[Target]:
    """The operator installed by the chart, a namespace and a bucket. Anew for each module: the chart's own tests
    uninstall the release, wherever they come in the order. A pass over a job that failed is tried again, and no test
    would see it: the module's last does."""
    # Two operators: one may lose its node.
    install.helm_install(prepared, {"replicas": 2})
    install.prepare_namespace(prepared, NAMESPACE, BUCKET)
    yield prepared
    trouble = _failed_passes(prepared)
    assert not trouble, trouble[:6000]


def _failed_passes(target: Target) -> str:
    """What the operators' logs say of them, from the first on."""
    for pod in install.operator_pods(target):
        try:
            log = target.kubectl("logs", "-n", install.SYSTEM_NAMESPACE, pod["metadata"]["name"])
        except DemoError:  # its node may have no power
            continue
        if (at := log.find("planning failed")) >= 0:
            return log[at:]
    return ""
