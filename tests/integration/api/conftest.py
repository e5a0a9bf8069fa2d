"""The TrainingJob's API on a real API server, and a namespace for each test."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from localcluster import Cluster
from localcluster.processes import wait_for

REPOSITORY = Path(__file__).resolve().parents[3]
CRD = REPOSITORY / "crds" / "lockstep.dev_trainingjobs.yaml"


class Api:
    """kubectl in one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Its output; raises ClusterError."""
        return self.cluster.kubectl("-n", self.namespace, *arguments, stdin=stdin)

    def attempt(self, manifest: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
        """`kubectl create`, whatever it answers."""
        command = ["kubectl", "-n", self.namespace, "create", "-f", "-", *arguments]
        environment = self.cluster.environment
        return subprocess.run(
            command,
            env=environment,
            input=json.dumps(manifest),
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The object as the server stored it."""
        done = self.attempt(manifest, "-o", "json")
        assert done.returncode == 0, done.stderr
        stored: dict[str, Any] = json.loads(done.stdout)
        return stored

    def patch(self, name: str, patch: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """A merge patch of a TrainingJob, whatever the answer is."""
        command = ["kubectl", "-n", self.namespace, "patch", "tj", name, "--type", "merge", "-p", json.dumps(patch)]
        return subprocess.run(
            command, env=self.cluster.environment, text=True, capture_output=True, timeout=60, check=False
        )

    def get(self, *what: str) -> dict[str, Any]:
        """`kubectl get … -o json`."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *what, "-o", "json"))
        return found


@pytest.fixture(scope="session")
def crd(control_plane: Cluster) -> dict[str, Any]:
    """The CRD, applied and established."""
    control_plane.kubectl("apply", "-f", str(CRD))
    # Not `kubectl wait`: it fails on a CRD so new that it has no conditions at all.
    served = ("get", "--raw", "/apis/lockstep.dev/v1alpha1")
    wait_for(
        "the CRD",
        lambda: "trainingjobs" in control_plane.kubectl(*served, check=False),
        30,
        control_plane.layout.logs / "apiserver.log",
    )
    manifest: dict[str, Any] = yaml.safe_load(CRD.read_text())
    return manifest


@pytest.fixture
def api(control_plane: Cluster, crd: dict[str, Any]) -> Iterator[Api]:
    """A namespace of the test's own."""
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", namespace)
    yield Api(control_plane, namespace)
    control_plane.kubectl("delete", "namespace", namespace, "--wait=false")
